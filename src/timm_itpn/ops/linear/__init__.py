"""Linear layer with what follows it, for inference: one contract, several implementations.

The contract, which every implementation in `IMPLEMENTATIONS` keeps:

    why_not(weight) -> reason why it cannot run on such a weight (None = it can)
    pack(weight) -> the weight in the form that `forward` wants, made once
    forward(x, packed, bias, act, residual) -> residual + act(x @ weight.T + bias)

    x: (..., in_features); weight: (out_features, in_features); one floating dtype.
    bias: (out_features,), or None.
    act: one of `ACTIVATIONS`.
    residual: None, or of the shape of the output.
"""
from types import ModuleType

import torch

from ..choose import choose
from . import onednn, reference

__all__ = ['ACTIVATIONS', 'IMPLEMENTATIONS', 'choose_linear']

ACTIVATIONS = reference.ACTIVATIONS
IMPLEMENTATIONS: dict[str, ModuleType] = {'onednn': onednn, 'reference': reference}


def choose_linear(name: str, weight: torch.Tensor) -> str:
    """As `choose` does, among `IMPLEMENTATIONS`; device and type of a weight (out_features, in_features) decide."""
    return choose('linear', name, {each: module.why_not(weight) for each, module in IMPLEMENTATIONS.items()})

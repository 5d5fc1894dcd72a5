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

from . import onednn, reference

__all__ = ['ACTIVATIONS', 'IMPLEMENTATIONS', 'choose_linear']

ACTIVATIONS = tuple(onednn.EPILOGUES)
IMPLEMENTATIONS: dict[str, ModuleType] = {'onednn': onednn, 'reference': reference}


def choose_linear(weight: torch.Tensor) -> str:
    """Return the first of `IMPLEMENTATIONS` that can run on a weight (out_features, in_features)."""
    return next(name for name, module in IMPLEMENTATIONS.items() if module.why_not(weight) is None)

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

ACTIVATIONS = reference.ACTIVATIONS
IMPLEMENTATIONS: dict[str, ModuleType] = {'onednn': onednn, 'reference': reference}


def choose_linear(name: str, weight: torch.Tensor) -> str:
    """Return the name of the implementation for a weight.

    Args:
        name: A key of `IMPLEMENTATIONS`, or 'auto' for the first of them that can run.
        weight: (out_features, in_features); its device and type decide.

    Raises:
        ValueError: `name` is unknown.
        RuntimeError: The implementation asked for cannot run; the message gives the reason.
    """
    if name == 'auto':
        return next(n for n in IMPLEMENTATIONS if IMPLEMENTATIONS[n].why_not(weight) is None)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f'linear {name!r} is unknown, use one of: auto, {", ".join(IMPLEMENTATIONS)}')
    reason = IMPLEMENTATIONS[name].why_not(weight)
    if reason is not None:
        raise RuntimeError(f'linear {name!r} cannot run: {reason}')
    return name

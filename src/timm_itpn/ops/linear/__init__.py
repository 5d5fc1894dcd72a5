"""Linear layer with what follows it: one contract, several implementations.

The contract, which every implementation in `IMPLEMENTATIONS` keeps:

    why_not(weight) -> reason why it cannot run on such a weight (None = it can)
    pack(weight) -> the weight in the form that `forward` wants, made once
    forward(x, packed, bias, act, residual) -> residual + act(x @ weight.T + bias)

    x: (..., in_features); weight: (out_features, in_features); one floating dtype.
    bias: (out_features,), or None.
    act: a key of `ACTIVATIONS`.
    residual: None, or of the shape of the output.

Those in `TRAINABLE` take the weight as it is for the packed one, and have gradients.
"""
from collections.abc import Iterable
from types import ModuleType

import torch

from . import onednn, onednn_grad, reference

__all__ = ['ACTIVATIONS', 'IMPLEMENTATIONS', 'TRAINABLE', 'choose']

ACTIVATIONS = tuple(reference.ACTIVATIONS)

IMPLEMENTATIONS: dict[str, ModuleType] = {
    'onednn': onednn,
    'onednn_grad': onednn_grad,
    'reference': reference,
}

TRAINABLE = ('onednn_grad', 'reference')


def choose(name: str, weight: torch.Tensor, among: Iterable[str] = tuple(IMPLEMENTATIONS)) -> str:
    """Return the name of the implementation for a weight.

    Args:
        name: A key of `IMPLEMENTATIONS`, or 'auto' for the first one of `among` that can run.
        weight: (out_features, in_features); its device and type decide.
        among: Keys of `IMPLEMENTATIONS`, in the order in which 'auto' takes them.

    Raises:
        ValueError: `name` is not in the table.
        RuntimeError: The implementation asked for cannot run; the message gives its reason.
    """
    if name == 'auto':
        return next(n for n in among if IMPLEMENTATIONS[n].why_not(weight) is None)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f'linear {name!r} is unknown, choose one of: auto, {", ".join(IMPLEMENTATIONS)}')
    reason = IMPLEMENTATIONS[name].why_not(weight)
    if reason is not None:
        raise RuntimeError(f'linear {name!r} cannot run: {reason}')
    return name

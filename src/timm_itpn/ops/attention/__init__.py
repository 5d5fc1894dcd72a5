"""Scaled dot-product attention: one contract, several implementations.

The contract, which every implementation in `IMPLEMENTATIONS` keeps:

    forward(q, k, v, bias, dropout_p) -> out

    q, k, v: (B, num_heads, N, head_dim), one floating dtype; scores are scaled by head_dim ** -0.5.
    bias: None, or a tensor that broadcasts to (B, num_heads, N, N) and is added to the scaled scores.
    dropout_p: probability of dropping an attention weight, 0 in evaluation.
    out: (B, num_heads, N, head_dim), the dtype of v.

An implementation is one file with `why_not()`, the reason it cannot run now (None = it can), and `forward`. To add one,
write the file and name it in the table; `choose('auto')` takes the first that can run.
"""
from types import ModuleType
from typing import Callable, Dict

from . import reference, sdpa

__all__ = ['IMPLEMENTATIONS', 'choose']

IMPLEMENTATIONS: Dict[str, ModuleType] = {
    'sdpa': sdpa,
    'reference': reference,
}


def choose(name: str = 'auto') -> Callable:
    """Return the `forward` of an implementation.

    Args:
        name: A key of `IMPLEMENTATIONS`, or 'auto' for the first one in the table that can run.

    Raises:
        ValueError: `name` is not in the table.
        RuntimeError: The implementation asked for cannot run; the message gives its reason.
    """
    if name == 'auto':
        name = next(n for n, implementation in IMPLEMENTATIONS.items() if implementation.why_not() is None)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f'attention {name!r} is unknown, choose one of: auto, {", ".join(IMPLEMENTATIONS)}')
    reason = IMPLEMENTATIONS[name].why_not()
    if reason is not None:
        raise RuntimeError(f'attention {name!r} cannot run: {reason}')
    return IMPLEMENTATIONS[name].forward

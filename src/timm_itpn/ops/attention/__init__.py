"""Scaled dot-product attention: one contract, several implementations.

The contract, which every implementation in `IMPLEMENTATIONS` keeps:

    forward(q, k, v, bias, dropout_p, scale) -> out

    q: (B, num_heads, N, head_dim); k, v: (B, num_heads, M, head_dim), one floating dtype.
    bias: None, or what broadcasts to (B, num_heads, N, M), added to the scaled scores. Where `TAKES_TABLE`, it may also
        be a table of the offsets on a grid of h * w = N tokens, (2h-1, 2w-1, num_heads); see `layers.rel_pos_bias`.
    dropout_p: probability of dropping an attention weight, 0 in evaluation.
    scale: factor on the scores, None for head_dim ** -0.5.
    out: (B, num_heads, N, head_dim), the dtype of v.

An implementation is one file with `why_not()`, the reason it cannot run now (None = it can), `TAKES_TABLE` and
`forward`. To add one, write the file and name it in the table; 'auto' is the first in the table that can run.
"""
from types import ModuleType

from . import flex, reference, sdpa

__all__ = ['IMPLEMENTATIONS', 'choose']

IMPLEMENTATIONS: dict[str, ModuleType] = {
    'sdpa': sdpa,
    'reference': reference,
    'flex': flex,
}


def choose(name: str = 'auto') -> str:
    """Return the name of the implementation to use.

    Args:
        name: A key of `IMPLEMENTATIONS`, or 'auto' for the first one in the table that can run.

    Raises:
        ValueError: `name` is not in the table.
        RuntimeError: The implementation asked for cannot run; the message gives its reason.
    """
    if name == 'auto':
        return next(n for n, implementation in IMPLEMENTATIONS.items() if implementation.why_not() is None)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f'attention {name!r} is unknown, choose one of: auto, {", ".join(IMPLEMENTATIONS)}')
    reason = IMPLEMENTATIONS[name].why_not()
    if reason is not None:
        raise RuntimeError(f'attention {name!r} cannot run: {reason}')
    return name

"""PyTorch's FlexAttention: a relative position bias is looked up in its table inside the kernel.

No (N, N) tensor is made, neither for the scores nor for the bias and its gradient. The kernel is compiled at the first
call, for each device, type and size. Only on request (`attn_impl='flex'`). On the CPU it has no backward pass.
"""
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import flex_attention

from . import sdpa

TAKES_TABLE = True
MIN_TORCH = (2, 6)  # 2.5 cannot look up a bias in a tensor on the CPU


def why_not() -> str | None:
    version = tuple(int(number) for number in torch.__version__.split('.')[:2])
    return f'it needs torch >= 2.6, and this is {torch.__version__}' if version < MIN_TORCH else sdpa.why_not()


@functools.cache
def compiled() -> Callable:
    return torch.compile(flex_attention)


def score_mod(bias: torch.Tensor) -> Callable:
    """What FlexAttention does to a score: add the bias of its pair, from all pairs or from a table of offsets."""
    if bias.ndim == 4:
        return lambda score, b, head, query, key: score + bias[b, head, query, key]
    height, width = (bias.shape[0] + 1) // 2, (bias.shape[1] + 1) // 2

    def add_offset(score: Any, b: Any, head: Any, query: Any, key: Any) -> Any:
        dy = query // width - key // width
        dx = query % width - key % width
        return score + bias[dy + height - 1, dx + width - 1, head]

    return add_offset


def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None = None,
        dropout_p: float = 0.,
        scale: float | None = None,
) -> torch.Tensor:
    if dropout_p > 0.:
        raise RuntimeError('FlexAttention has no dropout: use attn_drop_rate=0, or another attn_impl.')
    if bias is not None and bias.ndim == 4:
        bias = bias.expand(*q.shape[:3], k.shape[2])
    attention: Any = flex_attention if torch.compiler.is_compiling() else compiled()
    return attention(q, k, v, score_mod=None if bias is None else score_mod(bias), scale=scale)

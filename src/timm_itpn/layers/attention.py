"""Multi-head self-attention of stage 3."""
from typing import Any

import torch
import torch.nn as nn
from timm.layers import is_exporting

from ..ops.attention import Heads, attention_weights, choose_attention, fused_attention


class QkvBias(nn.Module):
    """Adds a bias to q and to v, none to k, where it would add the same number to all scores of a query.

    Packed q, k and v (..., 3 * dim) -> (..., 3 * dim).

    Args:
        dim: Width of a token.
    """

    def __init__(self, dim: int, **dd: Any):
        super().__init__()
        self.q_bias = nn.Parameter(torch.empty(dim, **dd))
        self.v_bias = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.q_bias)
        nn.init.zeros_(self.v_bias)

    def packed(self) -> torch.Tensor:
        """The bias of q, k and v, (3 * dim,)."""
        return torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.packed().to(x.dtype)


class Attention(nn.Module):
    """Self-attention with packed q, k and v. (B, N, dim) -> (B, N, dim).

    Args:
        dim: Width of a token.
        num_heads: Number of heads; must divide `dim`.
        k_bias: One bias for q, k and v, as part of their Linear layer; False = k has none, see `QkvBias`.
        attn_impl: One of `ops.attention.IMPLEMENTATIONS`, 'auto' for the first that can run.
        attn_drop: Dropout rate of the attention weights, 0..1.
        proj_drop: Dropout rate after the output projection, 0..1.
        dd: Device and dtype of the parameters.

    Attributes:
        attn_drop: Sees the attention weights (B, num_heads, N, N). None with fused attention, which makes no such
            tensor.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `attn_impl` is unknown.
        RuntimeError: The `attn_impl` that is asked for cannot run.
    """
    fused_attn: torch.jit.Final[bool]

    def __init__(
            self,
            dim: int,
            num_heads: int,
            k_bias: bool = True,
            attn_impl: str = 'auto',
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            **dd: Any,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f'embed_dim {dim} is not a multiple of num_heads {num_heads}')
        self.num_heads = num_heads
        self.attn_impl = choose_attention(attn_impl)
        self.fused_attn = self.attn_impl == 'sdpa'
        self.attn_drop_rate = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=k_bias, **dd)
        self.qkv_bias = nn.Identity() if k_bias else QkvBias(dim, **dd)
        self.attn_drop: Any = None if self.fused_attn else nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, attn_impl={self.attn_impl}'

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (..., dim) -> queries, keys and values (..., 3, num_heads, head_dim)."""
        return self.qkv_bias(self.qkv(x)).unflatten(-1, (3, self.num_heads, -1))

    def attend(self, heads: Heads, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Queries (B, num_heads, N, head_dim), keys and values (B, num_heads, M, head_dim) -> (B, N, dim)."""
        q, k, v = heads
        if self.fused_attn:
            x = fused_attention(q, k, v, bias, self.attn_drop_rate if self.training else 0.)
        else:
            weights = attention_weights(q, k, bias).type_as(v)
            x = self.attn_drop(weights) @ v
        x = x.transpose(1, 2)  # (B, num_heads, N, head_dim) -> (B, N, num_heads, head_dim)
        if is_exporting():
            x = x.clone(memory_format=torch.contiguous_format)  # strides change when an exporter decomposes attention
        return self.proj_drop(self.proj(x.flatten(2)))

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens (B, N, dim) -> (B, N, dim); `bias` broadcasts to the scores (B, num_heads, N, N)."""
        q, k, v = self.project(x).permute(2, 0, 3, 1, 4).unbind(0)  # each (B, num_heads, N, head_dim)
        return self.attend((q, k, v), bias)

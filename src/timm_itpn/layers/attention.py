"""Multi-head self-attention of stage 3."""

import torch
import torch.nn as nn

from ..ops.attention import IMPLEMENTATIONS, choose
from .linear import apply_linear, linear

__all__ = ['Attention']


class Attention(nn.Module):
    """Self-attention with packed q, k and v. (B, N, dim) -> (B, N, dim).

    Args:
        dim: Width of a token.
        num_heads: Number of heads; must divide `dim`.
        k_bias: One bias for q, k and v, as a part of their Linear layer. False = biases of their own for q and v, none
            for k, where it would add the same number to all scores of a query, which softmax removes.
        attn_impl: Key of `ops.attention.IMPLEMENTATIONS`, 'auto' for the first that can run.
        attn_drop: Dropout rate of the attention weights, 0..1.
        proj_drop: Dropout rate after the output projection, 0..1.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `attn_impl` is unknown.
        RuntimeError: The `attn_impl` that is asked for cannot run.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            k_bias: bool = False,
            attn_impl: str = 'auto',
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if dim % num_heads:
            raise ValueError(f'embed_dim {dim} is not a multiple of num_heads {num_heads}')
        self.num_heads = num_heads
        self.asked = attn_impl
        self.attn_impl = choose(attn_impl)
        self.attention = IMPLEMENTATIONS[self.attn_impl].forward
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=k_bias, **dd)
        if k_bias:
            self.q_bias = self.v_bias = self.k_bias = None
        else:
            self.q_bias = nn.Parameter(torch.empty(dim, **dd))
            self.v_bias = nn.Parameter(torch.empty(dim, **dd))
            self.register_buffer('k_bias', torch.empty(dim, **dd), persistent=False)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for bias in (self.q_bias, self.v_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        if self.k_bias is not None:
            nn.init.zeros_(self.k_bias)

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, attn_impl={self.attn_impl}{" (auto)" if self.asked == "auto" else ""}'

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (..., dim) -> queries, keys and values (..., 3, num_heads, head_dim)."""
        if self.q_bias is None:
            qkv = self.qkv(x) if torch.jit.is_scripting() else apply_linear(self.qkv, x)
        else:
            k_bias = self.k_bias.type_as(self.q_bias)  # mixed precision of FSDP2 casts parameters, not buffers
            qkv = linear(x, self.qkv.weight, torch.cat((self.q_bias, k_bias, self.v_bias)))
        return qkv.unflatten(-1, (3, self.num_heads, -1))

    def attend(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Queries (B, num_heads, N, head_dim), keys and values (B, num_heads, M, head_dim) -> (B, N, dim)."""
        x = self.attention(q, k, v, bias, self.attn_drop if self.training else 0.)
        x = x.transpose(1, 2).flatten(2)  # (B, num_heads, N, head_dim) -> (B, N, dim)
        x = self.proj(x) if torch.jit.is_scripting() else apply_linear(self.proj, x)
        return self.proj_drop(x)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens (B, N, dim) -> (B, N, dim); `bias` broadcasts to the scores (B, num_heads, N, N)."""
        q, k, v = self.project(x).permute(2, 0, 3, 1, 4).unbind(0)  # each (B, num_heads, N, head_dim)
        return self.attend(q, k, v, bias)

"""Attention through PyTorch's fused kernels (flash, memory-efficient, cuDNN; flash on the CPU).

No (N, N) tensor is made, except where PyTorch itself falls back to plain maths: attention dropout on the CPU.
`kernels.record_kernels` tells which kernel ran.
"""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, use_fused_attn

TAKES_TABLE = False
MANY_TOKENS = 2048


def why_not() -> str | None:
    return None if use_fused_attn() else 'timm has fused attention off (TIMM_FUSED_ATTN=0, or exportable=True)'


@torch.fx.wrap  # a leaf for FX: a tracer has no sizes to compare
@register_notrace_function
def gathered(x: torch.Tensor) -> torch.Tensor:
    """Keys or values (B, num_heads, N, head_dim), on the CPU with the rows of a head next to each other if N is large.

    Its kernel reads them once for each block of queries, so a copy is soon worth it.
    """
    if torch.jit.is_scripting():
        return x
    else:
        if torch.compiler.is_compiling() or not x.is_cpu or x.shape[-2] < MANY_TOKENS:
            return x
        return x.contiguous()


def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None = None,
        dropout_p: float = 0.,
        scale: float | None = None,
) -> torch.Tensor:
    k, v = gathered(k), gathered(v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)

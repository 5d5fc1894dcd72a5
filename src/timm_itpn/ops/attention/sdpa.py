"""Attention through PyTorch's fused kernels (flash, memory-efficient, cuDNN; flash on the CPU).

No (N, N) tensor is made, except where PyTorch itself falls back to plain maths: attention dropout on the CPU.
"""
from typing import Optional

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn

TAKES_TABLE = False


def why_not() -> Optional[str]:
    return None if use_fused_attn() else 'timm has fused attention off (TIMM_FUSED_ATTN=0, or exportable=True)'


def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        dropout_p: float = 0.,
        scale: Optional[float] = None,
) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)

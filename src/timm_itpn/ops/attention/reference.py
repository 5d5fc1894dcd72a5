"""Attention as written in the papers; the yardstick for the other implementations.

It holds the (N, N) scores in memory. Scores and softmax run in float32 when the inputs are shorter, as the official
models do; float64 stays float64.
"""

import torch
import torch.nn.functional as F

TAKES_TABLE = False


def why_not() -> str | None:
    return None


def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None = None,
        dropout_p: float = 0.,
        scale: float | None = None,
) -> torch.Tensor:
    # float32 factors of one element, not .float(): they lengthen half precision, leave float64, and FX can trace them
    q = q * q.new_full((1,), q.shape[-1] ** -0.5 if scale is None else scale, dtype=torch.float32)
    k = k * k.new_ones((1,), dtype=torch.float32)
    scores = q @ k.transpose(-2, -1)  # (B, num_heads, N, N)
    if bias is not None:
        scores = scores + bias
    weights = scores.softmax(dim=-1).type_as(v)
    if dropout_p > 0.:
        weights = F.dropout(weights, p=dropout_p)
    return weights @ v

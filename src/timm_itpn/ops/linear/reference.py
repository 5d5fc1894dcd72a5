"""The layers one after the other, as PyTorch has them; on any device, and what compilers and exporters see."""
import torch
import torch.nn.functional as F


def why_not(weight: torch.Tensor) -> str | None:
    return None


def pack(weight: torch.Tensor) -> torch.Tensor:
    return weight


def forward(
        x: torch.Tensor,
        packed: torch.Tensor,
        bias: torch.Tensor | None,
        act: str = 'none',
        residual: torch.Tensor | None = None,
) -> torch.Tensor:
    x = F.linear(x, packed, bias)
    if act == 'gelu':
        x = F.gelu(x)
    elif act == 'silu':
        x = F.silu(x)
    return x if residual is None else residual + x

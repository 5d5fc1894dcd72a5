"""The layers one after the other, as PyTorch has them; on any device, and what compilers and exporters see."""
from collections.abc import Callable

import torch
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    'none': lambda x: x,
    'gelu': F.gelu,
    'silu': F.silu,
}


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
    return finish(F.linear(x, packed, bias), act, residual)


def finish(x: torch.Tensor, act: str, residual: torch.Tensor | None) -> torch.Tensor:
    """What follows the product."""
    x = ACTIVATIONS[act](x)
    return x if residual is None else residual + x

"""Fixed sin-cos positions."""
import torch
from timm.layers import build_sincos2d_pos_embed

__all__ = ['sincos_positions']


def sincos_positions(grid_size: tuple[int, int], dim: int) -> torch.Tensor:
    """(1, height * width, dim): half of the channels by column, half by row, each first sines, then cosines.

    Args:
        grid_size: Tokens (height, width).
        dim: Channels, a multiple of 4.
    """
    height, width = grid_size
    positions = build_sincos2d_pos_embed([height, width], dim, reverse_coord=True, interleave_sin_cos=True)
    return positions.reshape(width, height, dim).transpose(0, 1).reshape(1, height * width, dim)

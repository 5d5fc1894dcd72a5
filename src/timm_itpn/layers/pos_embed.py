"""Resampling of absolute position embeddings."""
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import register_notrace_function, resample_abs_pos_embed

from .tracing import same_grid

__all__ = ['METHODS', 'resample_pos_embed', 'role_pos_embed']

METHODS = ('half_pixel', 'corners', 'crop')


@register_notrace_function
def resample_pos_embed(pos_embed: torch.Tensor, new_size: list[int], old_size: list[int]) -> torch.Tensor:
    """Resample (1, h*w, C) to another grid as the official models do: plain bicubic in float32, no antialiasing.

    Args:
        pos_embed: Embedding of `old_size[0] * old_size[1]` positions, row-major.
        new_size: New grid (height, width), in tokens.
        old_size: Grid of `pos_embed`.
    """
    if same_grid((new_size[0], new_size[1]), (old_size[0], old_size[1])):
        return pos_embed
    return resample_abs_pos_embed(
        pos_embed, new_size=new_size, old_size=old_size, num_prefix_tokens=0, antialias=False)


def role_pos_embed(
        pos_embed: torch.Tensor, new_size: tuple[int, int], old_size: tuple[int, int], method: str) -> torch.Tensor:
    """Make the embedding of another grid of (1, h*w, C), in one of the ways in which visual trackers make theirs.

    Args:
        pos_embed: Embedding of `old_size[0] * old_size[1]` positions, row-major.
        new_size: New grid (height, width), in tokens.
        old_size: Grid of `pos_embed`.
        method: 'half_pixel', as `resample_pos_embed`; 'corners', bicubic with aligned corners; 'crop', the upper left
            part of the grid, or 'corners' where a side is longer.

    Raises:
        ValueError: `method` is unknown.
    """
    if method not in METHODS:
        raise ValueError(f'positions {method!r} is unknown, use one of {METHODS}')
    if method == 'half_pixel' or new_size == old_size:
        return resample_pos_embed(pos_embed, list(new_size), list(old_size))
    grid = rearrange(pos_embed, '1 (h w) c -> 1 c h w', h=old_size[0])
    if method == 'crop' and new_size[0] <= old_size[0] and new_size[1] <= old_size[1]:
        grid = grid[:, :, :new_size[0], :new_size[1]]
    else:
        grid = F.interpolate(grid.float(), new_size, mode='bicubic', align_corners=True).to(pos_embed.dtype)
    return rearrange(grid, '1 c h w -> 1 (h w) c')

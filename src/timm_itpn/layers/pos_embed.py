"""Resampling of absolute position embeddings."""
import torch
from timm.layers import register_notrace_function, resample_abs_pos_embed

from .sizes import same_grid

__all__ = ['resample_pos_embed']


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

"""What stands on the pyramid in pre-training only: its levels are brought to one vector per token and summed.

Names of parameters are those of the official files. Index 0, 1, 2 is for strides 16, 8, 4.
"""
from collections.abc import Sequence

import torch
import torch.nn as nn
from einops import rearrange
from timm.layers import LayerNorm

from .student import LEVELS

__all__ = ['ConvLevels', 'LinearLevels']


class ConvLevels(nn.ModuleList):
    """Norm, then a convolution over all positions of a token: Fast-iTPN's.

    Args:
        dim: Channels of the levels.
        out_dim: Channels of each level's share.
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__([
            nn.Sequential(LayerNorm(dim), nn.Conv2d(dim, out_dim, kernel_size=2 ** i, stride=2 ** i))
            for i in range(len(LEVELS))])

    def forward(self, levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Maps (B, H, W, dim) of the levels, from fine to coarse -> one (B, h * w, out_dim) for each, coarse first."""
        out = []
        for (norm, conv), level in zip(self, levels[::-1]):
            x = conv(norm(level).permute(0, 3, 1, 2))  # (B, H, W, C) -> (B, D, h, w)
            out.append(rearrange(x, 'b d h w -> b (h w) d'))
        return out


class LinearLevels(nn.ModuleList):
    """Norm, then a Linear layer per position, whose outputs stand one after another: iTPN's.

    Args:
        dim: Channels of the levels.
        out_dim: Channels of each level's share, a multiple of 16.
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__([
            nn.Sequential(LayerNorm(dim), nn.Linear(dim, out_dim // 4 ** i)) for i in range(len(LEVELS))])

    def forward(self, levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """As `ConvLevels`."""
        return [
            rearrange(layer(level), 'b (h y) (w x) c -> b (h w) (y x c)', y=2 ** i, x=2 ** i)
            for i, (layer, level) in enumerate(zip(self, levels[::-1]))]

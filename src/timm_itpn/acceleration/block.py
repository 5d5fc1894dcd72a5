"""The block of stage 3 with token gathering and migration, for training and for inference."""
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..layers.blocks import AttentionBlock
from ..layers.fused import FusedAttentionBlock
from .gathering import attention_bias, window_heads, window_mean
from .migration import Left, depart

__all__ = ['MigrationBlock', 'Windows']


class Windows(NamedTuple):
    """Where tokens (B, W, K, C) in W windows stand."""
    positions: torch.Tensor  # on the grid (1 or B, W, K), row-major, height * width where padded
    gathering: torch.Tensor | None  # bias of the gathering tokens (W, W); None = windows see nothing of each other
    height: int  # of the grid, in tokens
    width: int  # of the grid, in tokens
    padded: bool  # there are padded positions


def _real(windows: Windows) -> torch.Tensor | None:
    """(1 or B, W, K), True where a position is not padded; None if none is."""
    return windows.positions < windows.height * windows.width if windows.padded else None


class Migration(nn.Module):
    """What the block does with its tokens; the class it is mixed with brings the layers: project, attend, feed.

    Attributes:
        windowed: Attention is in windows; False = among all tokens. The stage decides.
    """
    windowed: bool

    def forward(
            self,
            x: torch.Tensor,
            windows: Windows,
            num_leave: int,
    ) -> tuple[torch.Tensor, torch.Tensor, Left | None]:
        """Attention, then tokens leave, then the MLP of those that stay.

        Args:
            x: Tokens (B, W, K, C).
            windows: Where they stand.
            num_leave: Tokens of each window that leave.

        Returns:
            Tokens and positions as they came, without those that left; and these, None if no token leaves.
        """
        qkv = self.project(x)
        x = self.mix(x, qkv, windows)
        positions = windows.positions
        left: Left | None = None
        if num_leave > 0:
            positions = positions.expand(x.shape[0], -1, -1)
            keys = qkv[:, :, :, 1].flatten(-2)  # tokens are compared by their keys, of all heads together
            x, positions, left = depart(x, positions, keys, _real(windows), num_leave)
        return self.feed(x), positions, left

    def mix(self, x: torch.Tensor, qkv: torch.Tensor, windows: Windows) -> torch.Tensor:
        """Attention, with its residual sum.

        Args:
            x: Tokens (B, W, K, C).
            qkv: Their queries, keys and values (B, W, K, 3, num_heads, head_dim).
            windows: Where they stand.
        """
        positions, gathering, height, width, padded = windows
        if self.windowed:
            means = None if gathering is None else window_mean(qkv[:, :, :, 1:], _real(windows))
            heads = window_heads(qkv, means)
            queries = keys = positions
            if gathering is not None:  # gathering tokens have no position
                keys = F.pad(positions, (0, positions.shape[1]), value=float(height * width))
        else:
            heads = window_heads(qkv.flatten(1, 2)[:, None])
            queries = keys = positions.flatten(1, 2)[:, None]
        bias = attention_bias(positions, height * width, gathering, padded, self.windowed)
        if self.rel_pos_bias is not None:
            rel_pos_bias = self.rel_pos_bias(height, width, queries, keys)
            bias = rel_pos_bias if bias is None else rel_pos_bias + bias
        if bias is not None:
            bias = bias.type_as(qkv).expand(x.shape[0], -1, -1, -1, -1).flatten(0, 1)
        return self.attend(x, heads, bias)


class MigrationBlock(Migration, AttentionBlock):
    """`AttentionBlock` with token gathering and migration; it has the same arguments and parameters."""

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """The block for inference."""
        return FusedMigrationBlock(self)


class FusedMigrationBlock(Migration, FusedAttentionBlock):
    """`MigrationBlock` for inference."""

    def __init__(self, block: MigrationBlock):
        super().__init__(block)
        self.windowed = block.windowed

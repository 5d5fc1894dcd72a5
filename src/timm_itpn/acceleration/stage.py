"""Stage 3 with token gathering and token migration, and its blocks, for training and for inference."""
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module
from timm.models import checkpoint

from ..layers.blocks import AttentionBlock
from ..layers.fused import FusedAttentionBlock
from ..layers.stages import AttentionStage
from ..layers.tracing import constant_grid
from .migration import Left, depart, replenish
from .schedule import Schedule, num_leaving
from .windows import (
    attention_bias,
    gathering_bias,
    is_padded,
    partition,
    smallest_window,
    window_heads,
    window_mean,
    window_positions,
)


class Windows(NamedTuple):
    """Where tokens (B, W, K, C) in W windows stand, and who sees whom."""
    positions: torch.Tensor  # on the grid (1 or B, W, K), row-major, height * width where padded
    real: torch.Tensor | None  # (1 or B, W, K), True where a position is not padded; None if none is
    gathering: torch.Tensor | None  # bias of the gathering tokens (W, W); None = all tokens see each other
    height: int  # of the grid, in tokens
    width: int  # of the grid, in tokens


class Migration(nn.Module):
    """What the block does with its tokens; the class it is mixed with brings the layers: project, attend, feed."""

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
            x, positions, left = depart(x, positions, keys, windows.real, num_leave)
        return self.feed(x), positions, left

    def mix(self, x: torch.Tensor, qkv: torch.Tensor, windows: Windows) -> torch.Tensor:
        """Attention, with its residual sum.

        Args:
            x: Tokens (B, W, K, C).
            qkv: Their queries, keys and values (B, W, K, 3, num_heads, head_dim).
            windows: Where they stand.
        """
        positions, real, gathering, height, width = windows
        means: torch.Tensor | None = None
        if gathering is not None:
            means = window_mean(qkv[:, :, :, 1:], real)
        else:  # among all tokens: as in one window
            qkv, positions = qkv.flatten(1, 2)[:, None], positions.flatten(1, 2)[:, None]
            real = None if real is None else real.flatten(1, 2)[:, None]
        bias = attention_bias(positions, real, gathering)
        if self.rel_pos_bias is not None:
            num_means = 0 if means is None else means.shape[1]
            keys = F.pad(positions, (0, num_means), value=float(height * width))  # means have no position
            rel_pos_bias = self.rel_pos_bias(height, width, positions, keys)
            bias = rel_pos_bias if bias is None else rel_pos_bias + bias
        if bias is not None:
            bias = bias.type_as(qkv).expand(x.shape[0], -1, -1, -1, -1).flatten(0, 1)
        return self.attend(x, window_heads(qkv, means), bias)


class MigrationBlock(Migration, AttentionBlock):
    """`AttentionBlock` with token gathering and migration; it has the same arguments and parameters."""

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """The block for inference."""
        return FusedMigrationBlock(self)


class FusedMigrationBlock(Migration, FusedAttentionBlock):
    """`MigrationBlock` for inference."""


@register_notrace_module  # a leaf for FX: what it does depends on sizes
class MigrationStage(AttentionStage):
    """`AttentionStage` with token gathering and migration; it has the same parameters. (B, H, W, C) in and out.

    Tokens are split into windows, each with a gathering token if there are several. In the blocks that the schedule
    names, attention is in windows, and tokens leave between attention and MLP. After the last block every token is
    back at its position, those that left brought up to date by their partners, or as they were when they left.

    Args:
        args: As for `AttentionStage`.
        schedule: What each block does.
        kwargs: As for `AttentionStage`.

    Raises:
        ValueError: The schedule lets more tokens leave than a window has to give.
    """

    def __init__(self, *args: Any, schedule: Schedule, **kwargs: Any):
        super().__init__(*args, block_layer=MigrationBlock, **kwargs)
        self.gather_window = schedule.gather_window
        self.windowed = list(schedule.windowed)
        self.migrate = list(schedule.migrate)
        self.carry = schedule.carry
        self.leaving(*self.grid_size)  # or it would be refused in forward only

    def leaving(self, height: int, width: int) -> list[int]:
        """How many tokens leave each window of such a grid at each block; raise ValueError if it has too few."""
        return num_leaving(self.migrate, smallest_window(height, width, self.gather_window))

    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        self.leaving(*grid_size)
        super().set_grid_size(grid_size)

    def extra_repr(self) -> str:
        migrate = {i: amount for i, amount in enumerate(self.migrate) if amount > 0}
        gather_blocks = [i for i, windowed in enumerate(self.windowed) if windowed]
        return (
            f'gather_window={self.gather_window}, gather_blocks={gather_blocks}, migrate={migrate}, carry={self.carry}')

    def forward_blocks(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise ValueError('Windows and migration need a whole map: create the model without acceleration.')

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)[0]

    def run(self, x: torch.Tensor) -> tuple[torch.Tensor, list[Left | None]]:
        """Map (B, 2H, 2W, in_dim) -> map (B, H, W, dim), and for each block the tokens that left there, if any did."""
        x = self.embed(x)
        B, H, W, C = x.shape
        H, W = constant_grid(H, W)
        x = x.expand(B, H, W, C)  # the windows of a program are those of its example: it fails for another size
        N = H * W
        padded = is_padded(H, W, self.gather_window)
        leaving = self.leaving(H, W)
        positions = window_positions(H, W, self.gather_window, x.device)  # (windows, tokens of one)
        num_tokens = (positions < N).sum(dim=1)
        x = partition(x.reshape(B, N, C), positions)
        positions = positions[None]

        gathering = gathering_bias(num_tokens) if positions.shape[1] > 1 else None

        left: list[Left | None] = []
        for i, block in enumerate(self.blocks):
            real = positions < N if padded else None
            windows = Windows(positions, real, gathering if self.windowed[i] else None, H, W)
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, positions, out = checkpoint(block, x, windows, leaving[i])
            else:
                x, positions, out = block(x, windows, leaving[i])
            left.append(out)
            if leaving[i] > 0 and gathering is not None:
                num_tokens = num_tokens - leaving[i]
                gathering = gathering_bias(num_tokens)
        return replenish(x, positions, left, N, self.carry).reshape(B, H, W, C), left

"""Stage 3 with token gathering and token migration."""
from typing import Any

import torch
from timm.layers import register_notrace_module
from timm.models import checkpoint

from ..layers.stages import AttentionStage
from .block import MigrationBlock, Windows
from .gathering import gathering_bias
from .migration import Left, replenish
from .schedule import Schedule, num_leaving
from .windows import is_padded, partition, smallest_window, window_positions

__all__ = ['MigrationStage']


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
        self.migrate = list(schedule.migrate)
        self.carry = schedule.carry
        for block, windowed in zip(self.blocks, schedule.windowed):
            block.windowed = windowed
        self.check_grid_size(self.grid_size)

    def check_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Raise ValueError if more tokens would leave than the windows of such a grid have to give."""
        num_leaving(self.migrate, smallest_window(grid_size[0], grid_size[1], self.gather_window))

    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        self.check_grid_size(grid_size)
        super().set_grid_size(grid_size)

    def extra_repr(self) -> str:
        migrate = {i: amount for i, amount in enumerate(self.migrate) if amount > 0}
        gather_blocks = [i for i, block in enumerate(self.blocks) if block.windowed]
        return (
            f'gather_window={self.gather_window}, gather_blocks={gather_blocks}, migrate={migrate}, carry={self.carry}')

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)[0]

    def run(self, x: torch.Tensor) -> tuple[torch.Tensor, list[Left | None]]:
        """Map (B, 2H, 2W, in_dim) -> map (B, H, W, dim), and for each block the tokens that left there, if any did."""
        x = self.embed(x)
        B, H, W, C = x.shape
        if torch.jit.is_tracing():
            H, W = int(H), int(W)
            x = x.expand(B, H, W, C)  # the windows of a trace are those of this size: it fails for another
        N = H * W
        padded = is_padded(H, W, self.gather_window)
        leaving = num_leaving(self.migrate, smallest_window(H, W, self.gather_window))
        positions = window_positions(H, W, self.gather_window, x.device)  # (windows, tokens of one)
        num_tokens = (positions < N).sum(dim=1)
        x = partition(x.reshape(B, N, C), positions)
        positions = positions[None]

        gathers = positions.shape[1] > 1
        gathering = gathering_bias(num_tokens) if gathers else None

        left: list[Left | None] = []
        for i, block in enumerate(self.blocks):
            windows = Windows(positions, gathering, H, W, padded)
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, positions, out = checkpoint(block, x, windows, leaving[i])
            else:
                x, positions, out = block(x, windows, leaving[i])
            left.append(out)
            if leaving[i] > 0 and gathers:
                num_tokens = num_tokens - leaving[i]
                gathering = gathering_bias(num_tokens)
        return replenish(x, positions, left, N, self.carry).reshape(B, H, W, C), left

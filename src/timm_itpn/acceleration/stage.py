"""Stage 3 with token gathering and token migration."""
from collections.abc import Callable
from functools import partial

import torch
from timm.layers import register_notrace_module
from timm.models import checkpoint

from ..layers.stages import AttentionStage
from .block import MigrationBlock
from .gathering import gathering_bias, window_mean
from .migration import replenish
from .schedule import Schedule, num_leaving
from .windows import is_padded, partition, smallest_window, window_places

__all__ = ['MigrationStage', 'attention_stage']


@register_notrace_module  # a leaf for FX: what it does depends on sizes
class MigrationStage(AttentionStage):
    """`AttentionStage` with token gathering and migration; it has the same parameters. (B, H, W, C) in and out.

    Tokens are split into windows, each with a gathering token if there are several. In the blocks that the schedule
    names, attention is in windows, and tokens leave between attention and MLP. After the last block every token is
    back at its place, those that left as they were when they left.

    Args:
        args: As for `AttentionStage`.
        schedule: What each block does.
        kwargs: As for `AttentionStage`.

    Raises:
        ValueError: The schedule lets more tokens leave than a window has to give.
    """

    def __init__(self, *args, schedule: Schedule, **kwargs):
        super().__init__(*args, block_layer=MigrationBlock, **kwargs)
        self.gather_window = schedule.gather_window
        self.gather_form = schedule.gather_form
        self.migrate = list(schedule.migrate)
        self.gathering_bias = gathering_bias
        self.replenish = replenish
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
            f'gather_window={self.gather_window}, gather_blocks={gather_blocks}, gather_form={self.gather_form}, '
            f'migrate={migrate}')

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)[0]

    def run(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Map (B, 2H, 2W, in_dim) -> map (B, H, W, dim), and for each block the places of the tokens that left there.

        Places are (B or 1, windows, tokens), row-major; 1 as long as none has left.
        """
        x = self.embed(x)
        B, H, W, C = x.shape
        N = H * W
        padded = is_padded(H, W, self.gather_window)
        leaving = num_leaving(self.migrate, smallest_window(H, W, self.gather_window))
        places = window_places(H, W, self.gather_window, x.device)  # (windows, tokens of one)
        num_tokens = (places < N).sum(dim=1)
        x = partition(x.reshape(B, N, C), places)
        places = places[None]
        gathering: torch.Tensor | None = None
        num_gathering = 0
        if places.shape[1] > 1:
            gathering = self.gathering_bias(num_tokens)
            if self.gather_form == 'token':
                num_gathering = 1
                x = torch.cat((window_mean(x, places < N if padded else None)[:, :, None], x), dim=2)

        left: list[torch.Tensor] = []
        left_places: list[torch.Tensor] = []
        for i, block in enumerate(self.blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, places, out, out_places = checkpoint(
                    block, x, places, gathering, H, W, padded, leaving[i])
            else:
                x, places, out, out_places = block(x, places, gathering, H, W, padded, leaving[i])
            left.append(out)
            left_places.append(out_places)
            if leaving[i] > 0 and gathering is not None:
                num_tokens = num_tokens - leaving[i]
                gathering = self.gathering_bias(num_tokens)
        tokens, all_places = left + [x[:, :, num_gathering:]], left_places + [places]
        x = self.replenish(tokens, [p.expand(B, -1, -1) for p in all_places], N)
        return x.reshape(B, H, W, C), left_places


def attention_stage(schedule: Schedule | None) -> Callable:
    """What builds stage 3: the plain one, if there is no schedule."""
    return AttentionStage if schedule is None else partial(MigrationStage, schedule=schedule)

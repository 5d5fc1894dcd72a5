"""Token migration among the tokens of several images: those of one image leave, all others stay."""
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from timm.models import checkpoint

from ..acceleration.migration import Left, depart, replenish

__all__ = ['run_migrating']


def run_migrating(
        blocks: Iterable[Any], x: torch.Tensor, first: int, num: int, leaving: Sequence[int], checkpointing: bool,
) -> torch.Tensor:
    """Blocks of stage 3 on tokens (B, N, dim) -> (B, N, dim), with fewer of one image from block to block.

    Args:
        blocks: The blocks.
        x: Tokens.
        first: Where in the sequence the image begins.
        num: Tokens of the image.
        leaving: How many of them leave at each block, between attention and MLP.
        checkpointing: Recompute each block in the backward pass.
    """
    total, left = num, []
    positions = torch.arange(num, device=x.device).expand(len(x), 1, -1)
    for block, num_leave in zip(blocks, leaving):
        args = block, x, first, positions, num_leave
        x, positions, out = checkpoint(_step, *args) if checkpointing else _step(*args)
        left.append(out)
    num = positions.shape[2]
    image = replenish(x[:, None, first:first + num], positions, left, total, carry=True)
    return torch.cat((x[:, :first], image, x[:, first + num:]), dim=1)


def _step(
        block: Any, x: torch.Tensor, first: int, positions: torch.Tensor, num_leave: int,
) -> tuple[torch.Tensor, torch.Tensor, Left | None]:
    """A block: tokens without those that leave, positions (B, 1, M) of the image's in its grid, and those that left."""
    last, left = first + positions.shape[2], None
    qkv = block.project(x)
    x = block.attend(x, qkv.permute(2, 0, 3, 1, 4).unbind(0), None)
    if num_leave > 0:
        keys = qkv[:, None, first:last, 1].flatten(-2)  # (B, 1, M, dim)
        image, positions, left = depart(x[:, None, first:last], positions, keys, None, num_leave)
        x = torch.cat((x[:, :first], image[:, 0], x[:, last:]), dim=1)
    return block.feed(x), positions, left

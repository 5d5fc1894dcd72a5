"""The feature pyramid that is pre-trained together with the backbone.

It goes from stride 16 down to 4; nothing in it mixes positions except the splits, which stay inside a 16 x 16 pixel
patch. The levels at strides 32 and 64, which detectors want, are pooled from the one at stride 16.
"""
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from timm.layers import LayerNorm, Mlp

from .blocks import MlpBlock, run_blocks
from .patch_embed import ConvPatchSplit, padded

# 'subsample' keeps every other position, as torchvision's LastLevelMaxPool does
POOLS: dict[str, Callable] = {
    'max': lambda: nn.MaxPool2d(kernel_size=2),
    'avg': lambda: nn.AvgPool2d(kernel_size=2),
    'subsample': lambda: nn.MaxPool2d(kernel_size=1, stride=2),
}


class Halve(nn.Module):
    """Pool a map, (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), C).

    The last row or column of an odd side is pooled with itself. The numbers are those of pooling with `ceil_mode`,
    which loses rows in AOTInductor with dynamic sizes.

    Args:
        pool: Key of `POOLS`.
    """

    def __init__(self, pool: str):
        super().__init__()
        self.pool = POOLS[pool]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(padded(x.permute(0, 3, 1, 2), 2)).permute(0, 2, 3, 1)


class PyramidLevel(nn.Module):
    """One level: stage features, plus what comes from the level above, through blocks.

    Args:
        align: Layer that brings stage features to `dim` channels.
        split: Split of what comes from above, None at the top.
        dim: Channels of the level.
        depth: Blocks after the sum; the top has none.
        block_kwargs: For the blocks.
    """

    def __init__(self, align: nn.Module, split: nn.Module | None, dim: int, depth: int, **block_kwargs: Any):
        super().__init__()
        self.grad_checkpointing = False
        self.align = align
        self.split = split
        self.blocks = nn.Sequential(*[MlpBlock(dim, **block_kwargs) for _ in range(depth)])
        self.out = MlpBlock(dim, **block_kwargs)

    def forward(self, x: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
        """Stage features (B, H, W, in_dim) and the level above (B, H/2, W/2, above_dim) -> (B, H, W, dim)."""
        x = self.align(x)
        if self.split is not None:
            x = x + self.split(above)
        return self.blocks(x) if torch.jit.is_scripting() else run_blocks(self.blocks, x, self.grad_checkpointing)

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        """The block between what the level below sees, and the level's output. (B, H, W, dim) -> (B, H, W, dim)."""
        return self.out(x) if torch.jit.is_scripting() else run_blocks(self.out, x, self.grad_checkpointing)


class FeaturePyramid(nn.Module):
    """Feature pyramid of five levels, strides 4, 8, 16, 32, 64.

    Args:
        in_dims: Channels of stages 1, 2 and 3.
        dim: Channels of the levels.
        depth: Blocks in each of the levels at strides 8 and 4.
        mlp_ratio: Hidden channels per channel in the blocks.
        pre_norm: Normalise the features of stage 3.
        align_bias: Bias in the layers that bring stages 1 and 2 to `dim` channels.
        split_layer: Class of the splits.
        pool: How strides 32 and 64 are pooled: 'max', 'avg' or 'subsample'.
        concat: Join each level with the stage's own features, level first; the pooled levels have those of stage 3.
        mlp_layer: Class of the MLPs in the blocks.
        dd: Device and dtype of the parameters.

    Raises:
        ValueError: `pool` is unknown.
    """
    concat: torch.jit.Final[bool]

    def __init__(
            self,
            in_dims: tuple[int, int, int],
            dim: int = 256,
            depth: int = 1,
            mlp_ratio: float = 4.,
            pre_norm: bool = False,
            align_bias: bool = True,
            split_layer: Callable = ConvPatchSplit,
            pool: str = 'max',
            concat: bool = False,
            mlp_layer: Callable = Mlp,
            norm_layer: Callable = LayerNorm,
            **dd: Any,
    ):
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f'pyramid_pool {pool!r} is unknown, use one of {tuple(POOLS)}')
        self.concat = concat
        self.norm = norm_layer(in_dims[2], **dd) if pre_norm else nn.Identity()
        align, split = partial(nn.Linear, **dd), partial(split_layer, norm_layer=norm_layer, **dd)
        blocks: dict[str, Any] = dict(mlp_ratio=mlp_ratio, mlp_layer=mlp_layer, norm_layer=norm_layer, **dd)
        self.levels = nn.ModuleList([
            PyramidLevel(align(in_dims[0], dim, bias=align_bias), split(dim, dim), dim, depth, **blocks),
            PyramidLevel(align(in_dims[1], dim, bias=align_bias), split(in_dims[2], dim), dim, depth, **blocks),
            PyramidLevel(align(in_dims[2], dim), None, dim, 0, **blocks),
        ])
        self.pools = nn.ModuleList([Halve(pool), Halve(pool)])
        level_dims = [dim + in_dim if concat else dim for in_dim in in_dims]
        self.feature_info = [
            dict(module=f'levels.{i}', num_chs=num_chs, reduction=4 * 2 ** i) for i, num_chs in enumerate(level_dims)]
        self.feature_info += [
            dict(module=f'pools.{i}', num_chs=level_dims[2], reduction=32 * 2 ** i) for i in range(2)]

    @torch.jit.ignore
    def prune(self, indices: list[int]) -> None:
        """Remove what the levels at `indices` (0 = stride 4 to 4 = stride 64) do not need."""
        needed = {min(i, 2) for i in indices}
        for i, level in enumerate(self.levels):
            if i not in needed:
                level.out = nn.Identity()
            if i not in needed and (i == 2 or i < min(needed)):  # stride 8 is built from stage 3, not from stride 16
                level.align = level.split = level.blocks = nn.Identity()

    def forward(self, stages: list[torch.Tensor], indices: list[int]) -> list[torch.Tensor]:
        """Compute some levels, and of the others only what those need.

        Args:
            stages: Maps (B, H, W, C) of stages 1, 2 and 3.
            indices: Levels wanted, 0 = stride 4 to 4 = stride 64.

        Returns:
            Maps (B, H, W, D) of the levels wanted, from fine to coarse.
        """
        maps: dict[int, torch.Tensor] = {}  # by level
        top = self.norm(stages[2])
        if max(indices) >= 2:
            maps[2] = self.join(stages[2], self.levels[2].finish(self.levels[2](top, top)))
            maps[3] = self.pools[0](maps[2])
            maps[4] = self.pools[1](maps[3])
        if min(indices) <= 1:
            x8 = self.levels[1](stages[1], top)
            if 1 in indices:
                maps[1] = self.join(stages[1], self.levels[1].finish(x8))
            if 0 in indices:
                x4 = self.levels[0](stages[0], x8)
                maps[0] = self.join(stages[0], self.levels[0].finish(x4))
        return [maps[i] for i in sorted(indices)]

    def join(self, stage: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) and (B, H, W, dim) -> (B, H, W, dim), or (B, H, W, dim + C) with `concat`."""
        return torch.cat((level, stage), dim=-1) if self.concat else level

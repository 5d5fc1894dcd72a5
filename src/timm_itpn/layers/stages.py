"""The stages: a merge of 2 x 2 neighbours, then blocks. Maps are (B, H, W, C) in and out."""
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.layers import register_notrace_function, resample_abs_pos_embed, trunc_normal_
from timm.models import checkpoint
from torch.types import Device

from ..ops.attention import as_bias
from .blocks import AttentionBlock, MlpBlock, run_blocks
from .tracing import is_eager, same_grid


@torch.fx.wrap  # a leaf for FX: a tracer has no sizes to compare
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


class MlpStage(nn.Module):
    """Stage 1 or 2: an optional merge, then MLP blocks.

    Args:
        downsample: The merge, Identity for a stage without.
        dim: Channels of the stage.
        drop_path: Stochastic depth rate of each block.
        block_kwargs: For the blocks.
    """

    def __init__(self, downsample: nn.Module, dim: int, drop_path: Sequence[float], **block_kwargs: Any):
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*[MlpBlock(dim, drop_path=rate, **block_kwargs) for rate in drop_path])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        return self.blocks(x) if torch.jit.is_scripting() else run_blocks(self.blocks, x, self.grad_checkpointing)


class AttentionStage(nn.Module):
    """Stage 3: merge, absolute position embedding, attention blocks.

    Args:
        downsample: The merge.
        dim: Token width.
        num_heads: Attention heads.
        drop_path: Stochastic depth rate of each block.
        grid_size: Tokens (height, width) that `pos_embed` is for.
        dynamic_grid_size: Resample the position embeddings in forward when the map has another size.
        rel_pos_bias: Add a relative position bias in every block.
        pos_drop: Dropout rate after the position embedding.
        block_layer: Class of the blocks.
        block_kwargs: For the blocks.
    """
    dynamic_grid_size: torch.jit.Final[bool]

    def __init__(
            self,
            downsample: nn.Module,
            dim: int,
            num_heads: int,
            drop_path: Sequence[float],
            grid_size: tuple[int, int],
            dynamic_grid_size: bool = False,
            rel_pos_bias: bool = False,
            pos_drop: float = 0.,
            block_layer: Callable = AttentionBlock,
            device: Device = None,
            dtype: torch.dtype | None = None,
            **block_kwargs: Any,
    ):
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.grid_size = grid_size
        self.dynamic_grid_size = dynamic_grid_size
        self.grad_checkpointing = False
        self.downsample = downsample
        self.pos_embed = nn.Parameter(torch.empty(1, grid_size[0] * grid_size[1], dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop)
        self.blocks = nn.ModuleList([
            block_layer(
                dim,
                num_heads,
                window_size=grid_size if rel_pos_bias else None,
                dynamic_window_size=dynamic_grid_size,
                drop_path=rate,
                **block_kwargs,
                **dd,
            ) for rate in drop_path])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.pos_embed, std=.02)

    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Resample the position embeddings to `grid_size` tokens (height, width)."""
        if grid_size == self.grid_size:
            return
        with torch.no_grad():
            pos_embed = resample_pos_embed(self.pos_embed, new_size=list(grid_size), old_size=list(self.grid_size))
        self.pos_embed = nn.Parameter(pos_embed, requires_grad=self.pos_embed.requires_grad)
        block: Any
        for block in self.blocks:
            if block.rel_pos_bias is not None:
                block.rel_pos_bias.set_window_size(grid_size)
        self.grid_size = grid_size

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Merge and position embedding, (B, 2H, 2W, in_dim) -> (B, H, W, dim)."""
        return self.add_positions(self.downsample(x))

    def add_positions(self, x: torch.Tensor) -> torch.Tensor:
        """Add the position embedding to a map (B, H, W, dim)."""
        B, H, W, C = x.shape
        pos_embed = self.pos_embed
        if self.dynamic_grid_size:
            pos_embed = resample_pos_embed(pos_embed, new_size=[H, W], old_size=self.grid_size)
        return self.pos_drop(x.reshape(B, H * W, C) + pos_embed).reshape(B, H, W, C)

    def forward_blocks(
            self,
            x: torch.Tensor,
            height: int,
            width: int,
            start: int = 0,
            stop: int | None = None,
            bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Blocks `start` to `stop` - 1 on any sequence of tokens, (B, N, dim) -> (B, N, dim).

        Args:
            x: Tokens.
            height: Of the grid that the tokens fill; a relative position bias of another raises ValueError.
            width: Likewise.
            start: First block.
            stop: The block to stop before, None for none.
            bias: Added to the scores (B, num_heads, N, N), to which it broadcasts; or of bool, False where a query
                must not see a key. Every query must see one.
        """
        if not torch.jit.is_scripting() and is_eager(x) and self.blocks[0].rel_pos_bias is not None:
            if not self.dynamic_grid_size and (height, width) != self.grid_size:
                raise ValueError(f'The relative position bias is for a grid {self.grid_size}: use rel_pos_bias=False.')
        bias = as_bias(bias, x.dtype)
        for i, block in enumerate(self.blocks):
            if i >= start and (stop is None or i < stop):  # TorchScript cannot slice modules
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x, height, width, bias)
                else:
                    x = block(x, height, width, bias)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        B, H, W, C = x.shape
        return self.forward_blocks(x.reshape(B, H * W, C), H, W).reshape(B, H, W, C)


def stage_maps(stages: Iterable[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """Maps of all stages, from fine to coarse, of the stem's (B, H, W, C)."""
    maps = []
    for stage in stages:
        x = stage(x)
        maps.append(x)
    return maps

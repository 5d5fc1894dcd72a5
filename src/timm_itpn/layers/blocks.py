"""Residual blocks of the stages and of the feature pyramid, and how those that work per position are run."""
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from timm.layers import DropPath, LayerNorm, LayerScale, Mlp
from timm.models import checkpoint, checkpoint_seq

from ..ops.attention import Heads
from .attention import Attention
from .fused import FusedAttentionBlock, FusedMlp
from .rel_pos_bias import RelPosBias
from .tracing import is_eager

SLICE_SIZE = 2 ** 19  # elements of a map; with three times as many hidden channels 6 MiB in float32


class MlpBlock(nn.Module):
    """Residual MLP, per position; the block of stages 1 and 2 and of the pyramid. (..., dim) -> (..., dim).

    Args:
        dim: Channels.
        mlp_ratio: Hidden channels per channel.
        mlp_layer: Class of the MLP; it takes the arguments of timm's `Mlp`.
        proj_drop: Dropout rate after the MLP.
        drop_path: Stochastic depth rate.
        init_values: Layer scale at initialisation, 0 or None for no layer scale.
        dd: Device and dtype of the parameters.
    """

    def __init__(
            self,
            dim: int,
            mlp_ratio: float = 3.,
            mlp_layer: Callable = Mlp,
            proj_drop: float = 0.,
            drop_path: float = 0.,
            init_values: float | None = None,
            norm_layer: Callable = LayerNorm,
            **dd: Any,
    ):
        super().__init__()
        self.norm = norm_layer(dim, **dd)
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio), drop=(0., proj_drop), **dd)
        self.ls = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop_path(self.ls(self.mlp(self.norm(x))))

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """The block for inference."""
        return FusedMlp(self.norm, self.mlp, self.ls)


def run_blocks(blocks: nn.Module, x: torch.Tensor, checkpointing: bool) -> torch.Tensor:
    """Run per-position blocks on maps (B, H, W, C); TorchScript calls `blocks` itself.

    On a CPU without gradients they run on a few rows at a time: a tensor of more than 32 MiB gets new pages from the
    system each time, which cost about as much as the product that fills it. A hooked layer sees whole maps.

    Args:
        blocks: A block that works on each position by itself, or a Sequential of such.
        x: Maps.
        checkpointing: Recompute each block in the backward pass instead of keeping its activations.
    """
    if checkpointing:
        return checkpoint_seq(blocks, x) if isinstance(blocks, nn.Sequential) else checkpoint(blocks, x)
    if torch.is_grad_enabled() or not is_eager(x) or not x.is_cpu or x.numel() <= SLICE_SIZE or _is_hooked(blocks):
        return blocks(x)
    rows = x.flatten(0, 1)  # (B, H, W, C) -> (B*H, W, C)
    slices = rows.split(max(1, SLICE_SIZE // rows[0].numel()))
    return torch.cat([blocks(rows) for rows in slices]).unflatten(0, x.shape[:2])


def _is_hooked(blocks: nn.Module) -> bool:
    return nn.modules.module._has_any_global_hook() or any(
        module._forward_hooks or module._forward_pre_hooks for module in blocks.modules())


class AttentionBlock(nn.Module):
    """Pre-norm transformer block of stage 3; tokens are (B, N, dim).

    Args:
        dim: Token width.
        num_heads: Attention heads.
        mlp_ratio: Hidden width per token width.
        mlp_layer: Class of the MLP; it takes the arguments of timm's `Mlp`.
        attn_layer: Class of the attention; it takes the arguments of `Attention`.
        window_size: Grid (height, width) of the relative position bias, None for no such bias.
        dynamic_window_size: Resample that bias in forward when the map has another size.
        proj_drop: Dropout rate after attention and MLP.
        drop_path: Stochastic depth rate.
        init_values: Layer scale at initialisation, 0 or None for no layer scale.
        dd: Device and dtype of the parameters.
    """

    score_scale: float | None = None  # what queries still have to be scaled by, None for head_dim ** -0.5

    def __init__(
            self,
            dim: int,
            num_heads: int,
            mlp_ratio: float = 4.,
            mlp_layer: Callable = Mlp,
            attn_layer: Callable = Attention,
            window_size: tuple[int, int] | None = None,
            dynamic_window_size: bool = False,
            proj_drop: float = 0.,
            drop_path: float = 0.,
            init_values: float | None = None,
            norm_layer: Callable = LayerNorm,
            **dd: Any,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn_layer(dim, num_heads, proj_drop=proj_drop, **dd)
        self.rel_pos_bias = None
        if window_size is not None:
            self.rel_pos_bias = RelPosBias(window_size, num_heads, dynamic_window_size, **dd)
        self.ls1 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio), drop=(0., proj_drop), **dd)
        self.ls2 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (..., dim) -> queries, keys and values (..., 3, num_heads, head_dim)."""
        return self.attn.project(self.norm1(x))

    def attend(self, x: torch.Tensor, heads: Heads, bias: torch.Tensor | None) -> torch.Tensor:
        """Add to the tokens what attention makes of queries, keys and values."""
        return x + self.drop_path1(self.ls1(self.attn.attend(heads, bias).reshape(x.shape)))

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        """Add to the tokens what the MLP makes of them."""
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def forward(
            self, x: torch.Tensor, height: int, width: int, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens (B, N, dim), of a `height` x `width` grid where there is a relative position bias -> (B, N, dim)."""
        if self.rel_pos_bias is not None:
            own = self.rel_pos_bias(height, width)
            bias = own if bias is None else own + bias
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), bias)))
        return self.feed(x)

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """The block for inference."""
        return FusedAttentionBlock(self)

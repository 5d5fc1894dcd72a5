"""The 4 x 4 stem, and merges and splits of 2 x 2 neighbours, all on (B, H, W, C) maps.

Everything before stage 3, and in the pyramid, stays inside one 16 x 16 pixel patch: nothing here looks across a
patch's border.
"""
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from timm.layers import LayerNorm, register_notrace_function, to_2tuple

from .fused import FusedLinear, weights_of
from .tracing import holds

ImageSize = int | tuple[int, int]


def token_grid(img_size: ImageSize) -> tuple[int, int]:
    """Rows and columns of the tokens of an image; raise ValueError if a side is not a positive multiple of 16."""
    height, width = to_2tuple(img_size)
    if height < 16 or width < 16 or height % 16 or width % 16:
        raise ValueError(f'img_size {height} x {width} is not usable: both sides must be multiples of 16')
    return height // 16, width // 16


def padded(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """Repeat the last row and column of (B, C, H, W) until both sides are multiples."""
    H, W = x.shape[-2], x.shape[-1]
    if holds(H % multiple == 0) and holds(W % multiple == 0):
        return x
    below = (H + multiple - 1) // multiple * multiple - H  # OpenVINO cannot take the remainder of a size
    right = (W + multiple - 1) // multiple * multiple - W
    return F.pad(x, (0, right, 0, below), mode='replicate')


@torch.fx.wrap  # a leaf for FX: a tracer has no sizes to compare
@register_notrace_function
def check_input(x: torch.Tensor, height: int, width: int, dynamic: bool, pad: bool) -> torch.Tensor:
    """Return `x` (B, C, H, W), padded if need be, or raise ValueError if the model cannot take its size."""
    H, W = x.shape[-2], x.shape[-1]
    if pad:
        x = padded(x, 16)
    elif dynamic:
        if H % 16 != 0 or W % 16 != 0:
            raise ValueError(f'Input of {H} x {W} pixels: both sides must be multiples of 16; resize or pad it.')
    elif H != height or W != width:
        raise ValueError(
            f'Input of {H} x {W} pixels, but the model is built for {height} x {width}: resize the input, '
            'call model.set_input_size(), or create the model with img_size= or dynamic_img_size=True.')
    return x


class StemPatchEmbed(nn.Module):
    """Image to stem positions by a convolution with kernel = stride = 4.

    Named after timm's `PatchEmbed` and read by others like it, but sizes are checked and counted at the stride of the
    tokens (16), not of the convolution (4).

    Args:
        img_size: Image side or (height, width) in pixels, multiples of 16.
        in_chans: Image channels.
        embed_dim: Output channels.
        strict_img_size: True = only `img_size` is accepted; False = any sides that are multiples of 16.
        dynamic_img_pad: Take images of any size, which are padded to multiples of 16 at the right and the bottom by
            repeating their last column and row.
        norm_layer: Normalisation after the convolution, None for none.
        dd: Device and dtype of the parameters.
    """
    strict_img_size: torch.jit.Final[bool]
    dynamic_img_pad: torch.jit.Final[bool]

    def __init__(
            self,
            img_size: ImageSize = 224,
            in_chans: int = 3,
            embed_dim: int = 96,
            strict_img_size: bool = True,
            dynamic_img_pad: bool = False,
            norm_layer: Callable | None = None,
            **dd: Any,
    ):
        super().__init__()
        self.patch_size = (4, 4)
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.set_input_size(img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=4, stride=4, **dd)
        self.norm = norm_layer(embed_dim, **dd) if norm_layer is not None else nn.Identity()

    def set_input_size(self, img_size: ImageSize) -> None:
        self.grid_size = token_grid(img_size)
        self.img_size = to_2tuple(img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = check_input(x, self.img_size[0], self.img_size[1], not self.strict_img_size, self.dynamic_img_pad)
        x = self.proj(x).permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H/4, W/4, D)
        return self.norm(x.contiguous())  # once here, so that no later layer has to


class ConvPatch(nn.Module):
    """What merge and split by a convolution have in common: LayerNorm, then `CONV` with kernel = stride = 2.

    Args:
        dim: Input channels.
        out_dim: Output channels.
        norm_layer: Normalisation of each input position.
        dd: Device and dtype of the parameters.
    """
    CONV: type[nn.Module]

    def __init__(self, dim: int, out_dim: int, norm_layer: Callable = LayerNorm, **dd: Any):
        super().__init__()
        self.norm = norm_layer(dim, **dd)
        self.reduction = self.CONV(dim, out_dim, kernel_size=2, stride=2, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x).permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W) in channels-last memory
        return self.reduction(x).permute(0, 2, 3, 1).contiguous()  # (B, D, h, w) -> (B, h, w, D)


class ConvPatchMerge(ConvPatch):
    """Merge 2 x 2 neighbours by a convolution. (B, H, W, C) -> (B, H/2, W/2, D)."""
    CONV = nn.Conv2d


class LinearPatch(nn.Module):
    """What merge and split by a Linear layer have in common."""

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Pack the weight of the Linear layer."""
        self.reduction = FusedLinear(*weights_of(self.reduction))
        return self


class LinearPatchMerge(LinearPatch):
    """Merge 2 x 2 neighbours: LayerNorm over all four, then a Linear layer without bias.

    (B, H, W, C) -> (B, H/2, W/2, D). The neighbours stand in the order (0, 0), (1, 0), (0, 1), (1, 1), as (row,
    column). timm's Swin has the same layer, but pads for odd sides, which is one more copy of the map.
    Arguments as for `ConvPatch`, but the norm is of the four positions together.
    """

    def __init__(self, dim: int, out_dim: int, norm_layer: Callable = LayerNorm, **dd: Any):
        super().__init__()
        self.norm = norm_layer(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, C = x.shape
        x = x.reshape(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5)  # column before row
        x = self.norm(x.reshape(B, H // 2, W // 2, 4 * C))
        return self.reduction(x)


class ConvPatchSplit(ConvPatch):
    """Split each position in 2 x 2 by a transposed convolution. (B, H, W, C) -> (B, 2H, 2W, D)."""
    CONV = nn.ConvTranspose2d

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """The same as a Linear layer."""
        conv = self.reduction
        split = LinearPatchSplit(conv.in_channels, conv.out_channels, device='meta')
        split.norm = self.norm
        split.reduction = FusedLinear(rearrange(conv.weight, 'i o h w -> (h w o) i'), conv.bias.repeat(4))
        return split


class LinearPatchSplit(LinearPatch):
    """Split each position in 2 x 2: LayerNorm, then a Linear layer without bias. (B, H, W, C) -> (B, 2H, 2W, D).

    Its output is read as (row, column, channel) = (2, 2, D).
    Arguments as for `ConvPatch`.
    """

    def __init__(self, dim: int, out_dim: int, norm_layer: Callable = LayerNorm, **dd: Any):
        super().__init__()
        self.norm = norm_layer(dim, **dd)
        self.reduction = nn.Linear(dim, 4 * out_dim, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, C = x.shape
        x = self.reduction(self.norm(x))
        D = x.shape[-1] // 4
        x = x.reshape(B, H, W, 2, 2, D).transpose(2, 3)
        return x.reshape(B, 2 * H, 2 * W, D)  # (B, H, 2, W, 2, D) -> (B, 2H, 2W, D)

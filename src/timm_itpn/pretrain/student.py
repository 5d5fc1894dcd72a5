"""How objectives run a backbone with its pyramid on images of which a part is hidden."""
import torch
import torch.nn as nn
from einops import rearrange
from timm.models import checkpoint

from ..models.itpn import ITPN

__all__ = [
    'LEVELS', 'STEM', 'check_no_grid', 'check_student', 'freeze', 'gather_tokens', 'keep_indices', 'levels_of',
    'run_blocks', 'scale_gradient', 'split_patches', 'stage_maps', 'visible_maps']

LEVELS = (0, 1, 2)  # of the pyramid, strides 4, 8, 16
STEM = 4  # stem positions along a side of a patch


def check_student(backbone: ITPN) -> None:
    """Raise ValueError if the backbone cannot be pre-trained."""
    if backbone.pyramid is None:
        raise ValueError('The student has no feature pyramid: create it with pyramid=True.')
    if backbone.dynamic_img_size:
        raise ValueError('The student has dynamic_img_size=True: pre-training is at one size.')


def check_no_grid(backbone: ITPN) -> None:
    """Raise ValueError if the backbone needs all tokens of the grid."""
    third = backbone.stages[2]
    if third.blocks[0].rel_pos_bias is not None:
        raise ValueError('Tokens are dropped, so there is no grid: create the student with rel_pos_bias=False.')
    if hasattr(third, 'gather_window'):
        raise ValueError('Tokens are dropped, so there are no windows: create the student without acceleration.')


def scale_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """`x`, whose gradient is multiplied by `factor`."""
    return factor * x + (1 - factor) * x.detach()


def keep_indices(masked: torch.Tensor, num_masked: int) -> torch.Tensor:
    """Indices of the tokens that are not masked, in raster order.

    Args:
        masked: (B, H, W), True where masked.
        num_masked: In every image.

    Returns:
        (B, H * W - num_masked).
    """
    masked = masked.flatten(1)
    order = masked.to(torch.uint8).argsort(dim=1, stable=True)  # stable=True: raster order
    return order[:, :masked.shape[1] - num_masked]


def gather_tokens(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Tokens (B, N, ...) at `indices` (B, K) -> (B, K, ...)."""
    indices = indices.reshape(list(indices.shape) + [1] * (x.ndim - 2))
    return x.gather(1, indices.expand(-1, -1, *x.shape[2:]))


def split_patches(x: torch.Tensor, side: int) -> torch.Tensor:
    """Map (B, h * side, w * side, C) -> (B, h * w, side, side, C)."""
    return rearrange(x, 'b (h y) (w x) c -> b (h w) y x c', y=side, x=side)


def run_blocks(backbone: ITPN, x: torch.Tensor, height: int, width: int, first: int, last: int) -> torch.Tensor:
    """Blocks `first` to `last` - 1 of stage 3 on tokens (B, N, dim)."""
    stage = backbone.stages[2]
    for block in stage.blocks[first:last]:
        x = checkpoint(block, x, height, width) if stage.grad_checkpointing else block(x, height, width)
    return x


def stage_maps(backbone: ITPN, x: torch.Tensor) -> list[torch.Tensor]:
    """Maps of the three stages for all tokens, from the stem's (B, H / 4, W / 4, dim / 4)."""
    maps = []
    for stage in backbone.stages:
        x = stage(x)
        maps.append(x)
    return maps


def visible_maps(backbone: ITPN, images: torch.Tensor, visible: torch.Tensor) -> list[torch.Tensor]:
    """Maps of the three stages for the visible tokens only; the others are dropped before stage 1.

    Everything but attention stays inside one patch, so K visible patches make a map of one row: (B, 1, K, dim) after
    stage 3, and four and two times as high and wide before.

    Args:
        backbone: As `check_no_grid` wants it.
        images: (B, 3, H, W).
        visible: (B, K), indices of the visible tokens.
    """
    first, second, third = backbone.stages
    x = gather_tokens(split_patches(backbone.patch_embed(images), STEM), visible)
    x = rearrange(x, 'b k y x c -> b y (k x) c')
    x = first(x)
    maps = [x]
    x = second(x)
    maps.append(x)
    x = third.downsample(x).flatten(1, 2)  # (B, 1, K, C) -> (B, K, C)
    positions = third.pos_embed.expand(len(x), -1, -1)
    x = third.pos_drop(x + gather_tokens(positions, visible))
    x = run_blocks(backbone, x, 1, x.shape[1], 0, len(third.blocks))
    maps.append(x[:, None])
    return maps


def levels_of(backbone: ITPN, maps: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels of the pyramid at strides 4, 8 and 16, (B, H, W, pyramid_dim)."""
    fine, middle, coarse = backbone.pyramid(maps, list(LEVELS))
    return fine, middle, coarse


def freeze(module: nn.Module) -> nn.Module:
    """The module without gradients, in evaluation mode."""
    return module.requires_grad_(False).eval()

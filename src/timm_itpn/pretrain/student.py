"""The student: a backbone with its pyramid, and how it runs on images of which a part is hidden."""
import math

import torch
import torch.nn as nn
from einops import rearrange
from timm.layers import trunc_normal_

from ..layers.pyramid import FeaturePyramid
from ..layers.stages import AttentionStage
from ..models.itpn import ITPN as Student

__all__ = [
    'STEM_SIDE', 'Student', 'initialise', 'keep_indices', 'pyramid_levels', 'pyramid_of', 'split_patches',
    'stage_maps', 'third_stage', 'visible_maps']

STEM_SIDE = 4  # stem positions along a side of a patch
SCALED = ('mlp.fc1', 'mlp.fc1_g', 'mlp.fc1_x', 'mlp.fc2', 'attn.proj')


def third_stage(student: Student) -> AttentionStage:
    """Stage 3, which holds the positions and the attention blocks."""
    stage = student.stages[2]
    assert isinstance(stage, AttentionStage)
    return stage


def pyramid_of(student: Student) -> FeaturePyramid:
    """The pyramid.

    Raises:
        ValueError: The student has none.
    """
    if student.pyramid is None:
        raise ValueError('The student has no feature pyramid: create it with pyramid=True.')
    return student.pyramid


@torch.no_grad()
def initialise(student: Student) -> None:
    """Initialise a Fast-iTPN for pre-training, as published; the other models start as they are created.

    Matrices of stage 3 are xavier normal, each on its own, their biases zero; the stem is xavier uniform, seen as a
    matrix; positions are trunc normal of 0.02, cut at one standard deviation. Then every MLP, the values and what
    follows attention are scaled by sqrt(ln(2 * depth of stage 3)).
    """
    if student.family != 'fast_itpn':
        return
    stage = third_stage(student)
    stem = student.patch_embed.proj.weight
    stem.copy_(nn.init.xavier_uniform_(torch.empty_like(stem.flatten(1))).reshape(stem.shape))
    trunc_normal_(stage.pos_embed, std=.02, a=-.02, b=.02)
    scale = math.sqrt(math.log(2 * len(stage.blocks)))
    for name, module in student.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        leaf = '.'.join(name.split('.')[-2:])
        if name.startswith('stages.2.blocks.'):
            for matrix in module.weight.chunk(3 if leaf == 'attn.qkv' else 1):
                nn.init.xavier_normal_(matrix)
            for key, parameter in module.named_parameters(recurse=False):
                if key.endswith('bias'):
                    nn.init.zeros_(parameter)
        if leaf == 'attn.qkv':
            module.weight.chunk(3)[2].mul_(scale)  # the values
        elif leaf in SCALED:
            module.weight.mul_(scale)
            module.bias.mul_(scale)


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


def split_patches(x: torch.Tensor, side: int) -> torch.Tensor:
    """Map (B, h * side, w * side, C) -> (B, h * w, side, side, C)."""
    return rearrange(x, 'b (h y) (w x) c -> b (h w) y x c', y=side, x=side)


def stage_maps(student: Student, x: torch.Tensor) -> list[torch.Tensor]:
    """Maps of the three stages for all tokens, from the stem's (B, H / 4, W / 4, dim / 4)."""
    maps = []
    for stage in student.stages:
        x = stage(x)
        maps.append(x)
    return maps


def visible_maps(student: Student, images: torch.Tensor, visible: torch.Tensor) -> list[torch.Tensor]:
    """Maps of the three stages for the visible tokens only; the others are dropped before stage 1.

    Everything but attention stays inside one patch, so K visible patches make a map of one row: (B, 1, K, dim) after
    stage 3, and four and two times as high and wide before.

    Args:
        student: Without relative position bias and without acceleration, which need the grid.
        images: (B, 3, H, W).
        visible: (B, K), indices of the visible tokens.
    """
    first, second, _ = student.stages
    third = third_stage(student)
    x = split_patches(student.patch_embed(images), STEM_SIDE)
    x = torch.take_along_dim(x, visible[..., None, None, None], dim=1)
    fine = first(rearrange(x, 'b k y x c -> b y (k x) c'))
    middle = second(fine)
    x = third.downsample(middle).flatten(1, 2)  # (B, 1, K, C) -> (B, K, C)
    x = third.pos_drop(x + torch.take_along_dim(third.pos_embed, visible[..., None], dim=1))
    x = third.forward_blocks(x, 1, x.shape[1])
    return [fine, middle, x[:, None]]


def pyramid_levels(student: Student, maps: list[torch.Tensor]) -> list[torch.Tensor]:
    """Levels of the pyramid at strides 4, 8 and 16, (B, H, W, pyramid_dim)."""
    return pyramid_of(student)(maps, [0, 1, 2])

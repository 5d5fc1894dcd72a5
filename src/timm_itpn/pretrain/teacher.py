"""The teacher: a frozen timm model whose tokens are predicted."""
from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import to_2tuple

from .student import freeze

__all__ = ['Teacher', 'create_teacher']


class Teacher(nn.Module):
    """Tokens of a frozen model: of its last layer, after its norm, times its projection, then LayerNorm without affine.

    The projection into the space that image and text share is the classifier of timm's CLIP models. Those that were
    fine-tuned since, SigLIP, whose pooling is by attention, and models without text have none for tokens.

    Args:
        model: A timm model.
        grid_size: Tokens (height, width) of the student.

    Attributes:
        dim: Channels of the tokens.
        img_size: Height and width in pixels of the images that it wants.

    Raises:
        ValueError: The model has another grid; the message names the size to use.
    """

    def __init__(self, model: nn.Module, grid_size: tuple[int, int]):
        super().__init__()
        self.model = freeze(model)
        self.num_prefix_tokens = getattr(model, 'num_prefix_tokens', 0)
        self.projection = projection_of(model)
        self.dim = self.projection.out_features if isinstance(self.projection, nn.Linear) else model.num_features
        self.img_size = check_grid(model, grid_size)

    def train(self, mode: bool = True) -> 'Teacher':
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), normalised for the teacher -> (B, N, dim), float32."""
        x = self.model.forward_features(images.to(next(self.model.parameters()).dtype))
        if x.ndim == 4:
            x = x.flatten(1, 2) if getattr(self.model, 'output_fmt', '') == 'NHWC' else x.flatten(2).transpose(1, 2)
        x = self.projection(x[:, self.num_prefix_tokens:]).float()
        return F.layer_norm(x, x.shape[-1:])


def projection_of(model: nn.Module) -> nn.Module:
    """What brings tokens into the space that image and text share; Identity if there is none."""
    cfg = model.pretrained_cfg
    classifier = model.get_classifier()
    is_clip = 'clip' in cfg['architecture'] and '_ft_' not in f'_{cfg.get("tag", "")}'
    return classifier if is_clip and isinstance(classifier, nn.Linear) else nn.Identity()


def create_teacher(
        name: str,
        grid_size: tuple[int, int],
        img_size: int | None = None,
        checkpoint_path: str = '',
) -> Teacher:
    """Create a teacher of any timm name whose tokens have the student's grid.

    Args:
        name: timm's name of the model.
        grid_size: Tokens (height, width) of the student.
        img_size: Side of its images in pixels; None for that which gives the student's grid.
        checkpoint_path: File of its weights, '' for the published ones.

    Raises:
        ValueError: Its grid is another; the message names the size to use.
    """
    stride = stride_of(name)
    size = to_2tuple(img_size) if img_size else (grid_size[0] * stride, grid_size[1] * stride)
    kwargs: dict[str, Any] = dict(pretrained_cfg_overlay=dict(file=checkpoint_path)) if checkpoint_path else {}
    model = timm.create_model(name, pretrained=True, img_size=size, **kwargs)
    return Teacher(model, grid_size)


def stride_of(name: str) -> int:
    """Pixels per token along a side of the last features of a timm model."""
    model = timm.create_model(name, device='meta')
    return model.feature_info[-1]['reduction']


def check_grid(model: nn.Module, grid_size: tuple[int, int]) -> tuple[int, int]:
    """Size of the images of `model` (height, width); ValueError if its tokens do not fit the student's one by one."""
    stride = model.feature_info[-1]['reduction']
    size = getattr(getattr(model, 'patch_embed', None), 'img_size', None) or model.pretrained_cfg['input_size'][-2:]
    grid = (size[0] // stride, size[1] // stride)
    if grid != tuple(grid_size):
        wanted = grid_size[0] * stride
        raise ValueError(
            f'The teacher has {grid[0]} x {grid[1]} tokens at {size[0]} x {size[1]} pixels, the student '
            f'{grid_size[0]} x {grid_size[1]}: use --teacher-img-size {wanted}, or another --img-size.')
    return size[0], size[1]

"""The teacher: a frozen timm model whose tokens are predicted."""
from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from ..engine.checkpoints import not_finite
from ..weights.fetch import in_a_line
from ..weights.read import why_no_weight_file


class Teacher(nn.Module):
    """Tokens of a frozen model: of its last layer, after its norm, times its projection, then LayerNorm without affine.

    The projection into the space that image and text share is the classifier of timm's CLIP models. Fine-tuned ones,
    SigLIP, whose pooling is by attention, and models without text have none for tokens.

    Args:
        model: A timm model.
        img_size: Height and width in pixels of the images that it takes.

    Attributes:
        dim: Channels of the tokens.
    """

    def __init__(self, model: Any, img_size: tuple[int, int]):
        super().__init__()
        cfg, classifier = model.pretrained_cfg, model.get_classifier()
        is_clip = 'clip' in cfg['architecture'] and '_ft_' not in f'_{cfg.get("tag", "")}'
        self.model: Any = model.requires_grad_(False)
        self.img_size = img_size
        self.num_prefix_tokens = getattr(model, 'num_prefix_tokens', 0)
        self.projection = classifier if is_clip and isinstance(classifier, nn.Linear) else nn.Identity()
        self.dim = getattr(self.projection, 'out_features', model.num_features)
        self.eval()

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


def create_teacher(
        name: str, grid_size: tuple[int, int], img_size: int | None = None, checkpoint_path: str = '') -> Teacher:
    """Create a teacher of any timm name whose tokens have the student's grid.

    Args:
        name: timm's name of the model.
        grid_size: Tokens (height, width) of the student.
        img_size: Side of its images in pixels; None for the one that gives the student's grid.
        checkpoint_path: File of its weights, '' for the published ones.

    Raises:
        ValueError: Its grid is another; the message names the size to use. Or its weights are damaged, or out of reach.
    """
    if checkpoint_path:
        if reason := why_no_weight_file(checkpoint_path):
            raise ValueError(f'--teacher-path {checkpoint_path} is {reason}: name the weights of {name}')
    height, width = grid_size
    model: Any = timm.create_model(name, device='meta')
    stride = model.feature_info[-1]['reduction']  # pixels along a side of a token
    size = (img_size, img_size) if img_size else (height * stride, width * stride)
    grid = (size[0] // stride, size[1] // stride)
    if grid != (height, width):
        raise ValueError(
            f'The teacher has {grid[0]} x {grid[1]} tokens at {size[0]} x {size[1]} pixels, the student {height} x '
            f'{width}: use --teacher-img-size {height * stride}, or another --img-size.')
    overlay = dict(file=checkpoint_path) if checkpoint_path else None
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=size)
    except OSError as error:  # of the Hub's client, too
        raise ValueError(f'The weights of the teacher {name} cannot be had ({in_a_line(error)}): try again, or name a '
                         'file of them with --teacher-path') from error
    if bad := not_finite(dict(model.named_parameters())):
        raise ValueError(f'The weights of the teacher {name} are not finite, {bad} for one: name others')
    return Teacher(model, size)

"""A backbone for torchvision's detection models, which want one module that returns named maps of equal channels."""
from typing import Any

import torch
import torch.nn as nn
from timm.models import create_model


class DetectionBackbone(nn.Module):
    """A model with feature pyramid, as torchvision's detectors take it.

    Levels are named by their index among those returned: '0' to '4' are strides 4, 8, 16, 32, 64. The defaults of
    `FasterRCNN`, `MaskRCNN` and `RetinaNet` are made for such five levels. torchvision pads images to multiples of 32,
    which suits, and its default mean and std are those of the models.

    Args:
        model_name: Name of a model with pyramid, such as 'fast_itpn_tiny_fpn'.
        pyramid_pool: How strides 32 and 64 are made of 16; the authors' detectors pool by average.
        kwargs: For `timm.create_model`, such as `pretrained`, `out_indices`, `drop_path_rate`, or `img_size` for images
            of one size only (torchvision's `fixed_size`).

    Attributes:
        body: timm's feature extractor.
        out_channels: Channels of every level.

    Raises:
        ValueError: The levels have unequal numbers of channels.
    """

    def __init__(self, model_name: str, pyramid_pool: str = 'avg', **kwargs: Any):
        super().__init__()
        # feature_cls: the other feature classes of timm give maps that are channels last
        body: Any = create_model(
            model_name, features_only=True, feature_cls='getter', pyramid_pool=pyramid_pool, **kwargs)
        channels = body.feature_info.channels()
        if len(set(channels)) > 1:
            raise ValueError(
                f'The levels of {model_name} have {channels} channels, but a detector needs the same number in all: '
                f'use a model whose name ends in _fpn, without pyramid_concat=True.')
        self.body = body
        self.out_channels = channels[0]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps from fine to coarse: (B, in_chans, H, W) -> named (B, out_channels, ceil(H/stride), ceil(W/stride))."""
        levels = self.body(x)
        assert isinstance(levels, list)  # TorchScript reads a Union
        return {str(i): level for i, level in enumerate(levels)}

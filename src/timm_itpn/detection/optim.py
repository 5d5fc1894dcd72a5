"""Parameter groups with layer decay over backbone, pyramid and heads, as the authors set them for detection."""
from collections import defaultdict
from typing import Any

import torch.nn as nn
from timm.models import group_parameters

from ..models.detection import DetectionBackbone

__all__ = ['param_groups']

PREFIX = 'backbone.body.model.'


def param_groups(
        model: nn.Module, weight_decay: float = 0.05, layer_decay: float = 0.9) -> list[dict[str, Any]]:
    """Groups for an optimizer; `lr_scale` is what timm's schedules multiply the learning rate by.

    Patch embed and positions are layer 0, blocks and merges 1, 2, ... in their order, all else is the last layer, L.
    Layer i learns at `layer_decay` ** (L - i) of the rate. As in the authors' settings L is 1 + the number of blocks
    (31 for base, 45 for large), without the two merges, so the last block has the rate of the heads divided by
    `layer_decay`, the one before it their rate.

    Args:
        model: Detector whose backbone is a `DetectionBackbone`.
        weight_decay: Of all but 1-D parameters (so biases and norms), absolute positions and relative position tables.
        layer_decay: Of the learning rate, per layer.

    Raises:
        ValueError: The backbone is another.
    """
    if not isinstance(getattr(model, 'backbone', None), DetectionBackbone):
        raise ValueError('Layer decay needs a detector whose backbone is a DetectionBackbone, as mask_rcnn makes it.')
    body: Any = model.get_submodule(PREFIX.strip('.'))
    layers = group_parameters(body, body.group_matcher(), reverse=True)
    last = 1 + sum(len(stage.blocks) for stage in body.stages)
    not_decayed = body.no_weight_decay()
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for full_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = full_name.removeprefix(PREFIX)
            layer = layers[name] if name in layers and not name.startswith('pyramid.') else last
            decay = 0. if parameter.ndim <= 1 or name in not_decayed else weight_decay
            groups[layer_decay ** (last - layer), decay].append(parameter)
    return [
        dict(params=params, lr_scale=scale, weight_decay=decay) for (scale, decay), params in groups.items()]

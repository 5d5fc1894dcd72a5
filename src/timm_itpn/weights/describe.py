"""What native weights are: which network, and which parts are there. No tensor's values are looked at."""
import re
from collections import Counter
from typing import NamedTuple

import torch

from .layout import (
    CLASSIFIER,
    CLASSIFIER_NORM,
    POS_EMBED,
    PRETRAIN,
    PYRAMID,
    TABLE,
    TRACKING,
    native_depths,
    native_layout,
    native_pyramid_depth,
    pretraining_part,
)


class Description(NamedTuple):
    """What is in a state dict."""
    family: str  # 'Fast-iTPN' or 'iTPN', which HiViT is too
    embed_dim: int  # width of stage 3
    depths: tuple[int, int, int]  # blocks of stages 1, 2 and 3
    in_chans: int  # image channels
    num_tokens: int  # positions of the position embedding
    num_classes: int  # of the classifier, 0 without one
    pretraining: bool  # weights have no classifier's norm, as pre-training leaves them
    layer_scale: bool  # whether there is any
    rel_pos_bias: bool  # whether there is any
    pyramid_dim: int  # channels of the pyramid, 0 without one
    pyramid_depth: int  # blocks in each of its finer levels
    parts: dict[str, int]  # number of values in each part

    @property
    def network(self) -> str:
        """Family and size, in words."""
        return f'{self.family} with depths {list(self.depths)} and embed_dim {self.embed_dim}'


def describe(native: dict[str, torch.Tensor]) -> Description:
    """Describe native weights; tensors on device meta do.

    Raises:
        ValueError: Stem or position embedding are missing.
    """
    missing = [key for key in ('patch_embed.proj.weight', POS_EMBED) if key not in native]
    if missing:
        raise ValueError(f'The checkpoint is incomplete: it has no {" and no ".join(missing)}.')
    pyramid_out = native.get('pyramid.levels.2.out.mlp.fc1.weight')
    parts: Counter[str] = Counter()
    for key, value in native.items():
        parts[part_of(key, native)] += value.numel()
    return Description(
        family=native_layout(native).family,
        embed_dim=native[POS_EMBED].shape[-1],
        depths=native_depths(native),
        in_chans=native['patch_embed.proj.weight'].shape[1],
        num_tokens=native[POS_EMBED].shape[1],
        num_classes=next((len(native[key]) for key in CLASSIFIER if key in native), 0),
        pretraining=not any(key in native for key in CLASSIFIER_NORM),
        layer_scale='layer scale' in parts,
        rel_pos_bias='relative position bias' in parts,
        pyramid_dim=0 if pyramid_out is None else pyramid_out.shape[1],
        pyramid_depth=native_pyramid_depth(native),
        parts=dict(parts),
    )


def part_of(key: str, native: dict[str, torch.Tensor]) -> str:
    """Name of the part that a key of native weights belongs to."""
    if key.startswith(PRETRAIN):
        return pretraining_part(key.removeprefix(PRETRAIN), native_layout(native)) or 'unknown'
    if key.startswith(TRACKING):
        return "tracker's own"
    if key.startswith(PYRAMID):
        return 'pyramid'
    if key in CLASSIFIER:
        return 'classifier'
    if key in CLASSIFIER_NORM:
        return 'norm before the classifier'
    if re.search(r'\.ls[12]?\.gamma$', key):
        return 'layer scale'
    if key.endswith(TABLE):
        return 'relative position bias'
    return 'backbone' if key.startswith(('patch_embed.', 'stages.')) else 'unknown'

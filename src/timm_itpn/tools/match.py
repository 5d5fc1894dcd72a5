"""Which registered model takes given weights, and with which arguments."""
import functools
import math
from typing import Any

import timm
import torch

from ..models import MODULES, check_name
from ..weights.checkpoint import fit_to_model
from ..weights.describe import Description, describe
from ..weights.layout import CLASSIFIER
from ..weights.sources import plain_name, source_of

SIZE_ARGS = {'embed_dim', 'depths'}  # where somebody tells these, the size need not be a registered one
OWN = dict(  # pretrained cfg of weights that are nobody's published ones
    tag='', url=None, hf_hub_id=None, hf_hub_filename=None, origin_url=None, description=None, notes=None)


def matching_models(weights: Description, published: bool) -> list[str]:
    """Registered models that weights may be of.

    Args:
        weights: What they are.
        published: Whether they may be published ones: official files may be, and what was converted from them. They
            are then of `arch.tag` where they are as those of the tag; others are of `arch`.
    """
    names = []
    for arch in timm.list_models(module=MODULES, exclude_filters='*_fpn'):
        if arch.startswith('hivit') and (weights.pyramid_dim or weights.layer_scale):
            continue
        if _default(arch, False)[0].network == weights.network:
            tags = [n for n in timm.list_models(module=MODULES, include_tags=True) if n.startswith(f'{arch}.')]
            names += [name for name in tags if published and not why_not_published(name, weights)] or [arch]
    return names


def why_not_published(name: str, weights: Description) -> str:
    """Why weights cannot be those of the published file of `arch.tag`, '' if they can, as far as shapes tell."""
    if source_of(name) is None:
        return f'there is no published file of {name}'
    try:
        args = _args(name, weights)
    except ValueError as error:
        return str(error)
    told = ', '.join(f'{key}={value}' for key, value in args.items() if key not in ('img_size', 'num_classes'))
    if told:
        return f'{name} holds it only if created with {told}, which the published file does not need'
    cfg = timm.get_pretrained_cfg(name)
    if cfg is not None and weights.pretraining != (cfg.num_classes == 0):
        return f'it has {"no" if weights.pretraining else "a"} classifier, unlike the published file of {name}'
    return ''


def choose_model(weights: Description, published: bool) -> str:
    """The one registered model that weights are of.

    Raises:
        ValueError: There is none, or more than one.
    """
    names = matching_models(weights, published)
    if len(names) != 1:
        which = f'which {" and ".join(names)} are: choose one with --model' if names else 'which no registered model is'
        raise ValueError(f'The checkpoint is of {weights.network}, {which}.')
    return names[0]


def model_args(
        name: str,
        native: dict[str, torch.Tensor],
        weights: Description,
        img_size: tuple[int, int] | None,
        told: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Arguments of the model that holds the weights; those in `told` are not told from the weights.

    Raises:
        ValueError: It cannot hold them; the message says what differs.
    """
    check_name(name)
    height, width = img_size or (0, 0)
    if img_size and (height // 16) * (width // 16) != weights.num_tokens:
        raise ValueError(
            f'The position embedding has {weights.num_tokens} tokens, but {height} x {width} pixels are '
            f'{height // 16} x {width // 16}: correct --img-size or --role. A tracker with positions under other names '
            '(pos_embed_x) has in this one those of a pre-training file: --role search=224.')
    if weights.num_classes and not all(key in native for key in CLASSIFIER):
        raise ValueError(f'The checkpoint is incomplete: of {" and ".join(CLASSIFIER)} it has one only.')
    if name.partition('.')[0].endswith('_fpn') and not weights.pyramid_dim:
        raise ValueError(
            f'The checkpoint has no feature pyramid, which {name} needs: take {plain_name(name)} with --model.')
    args = {**(told or {}), **_args(name, weights, img_size, told), **_cfg_args(name)}
    try:
        model = timm.create_model(name, device='meta', pyramid=weights.pyramid_dim > 0, **args)
    except Exception as error:  # whatever values of a file make the constructor raise
        raise ValueError(f'{name} cannot be created with {told}: {error or type(error).__name__}') from error
    fit_to_model(native, model)
    return args


def _args(
        name: str,
        weights: Description,
        img_size: tuple[int, int] | None = None,
        told: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What a model needs to be told to hold the weights."""
    default, default_size = _default(name, weights.pyramid_dim > 0)
    args: dict[str, Any] = {}
    if SIZE_ARGS & (told or {}).keys():
        args = dict(embed_dim=weights.embed_dim, depths=weights.depths)
    elif (file := weights.network) != (own := default.network):
        raise ValueError(f'The checkpoint is of {file}, but the model is of {own}: name another with --model.')
    side = math.isqrt(weights.num_tokens)
    if img_size is None and side * side != weights.num_tokens:
        raise ValueError(
            f'The position embedding has {weights.num_tokens} tokens, which is not a square grid: give `timm-itpn '
            'convert` the image size that it was trained at with --img-size HEIGHT WIDTH.')
    if (pixels := img_size or (16 * side, 16 * side)) != default_size:
        args['img_size'] = pixels
    for key in ('num_classes', 'in_chans', 'pyramid_dim', 'pyramid_depth'):
        if getattr(weights, key) != getattr(default, key):
            args[key] = getattr(weights, key)
    if weights.layer_scale != default.layer_scale:
        args['init_values'] = 0.1 if weights.layer_scale else 0.
    is_pretraining = weights.pretraining and "tracker's own" not in weights.parts  # that on pixels has no bias yet
    if weights.rel_pos_bias != default.rel_pos_bias and not is_pretraining:
        args['rel_pos_bias'] = weights.rel_pos_bias
    return args


@functools.cache
def _default(name: str, pyramid: bool) -> tuple[Description, tuple[int, int]]:
    """Weights and image size of a model as it is created without further arguments."""
    model: Any = timm.create_model(name, device='meta', pyramid=pyramid, **_cfg_args(name))
    return describe(model.state_dict()), model.patch_embed.img_size


def _cfg_args(name: str) -> dict[str, Any]:
    return {} if '.' in name else dict(pretrained_cfg_overlay=OWN)

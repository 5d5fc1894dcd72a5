"""From whatever a checkpoint file holds to a state dict that fits a model, with nothing dropped in silence."""
import logging
import math
import re
from typing import Any, Dict, List, Tuple

import torch
import torch.nn as nn
from timm.layers import to_2tuple
from timm.models import clean_state_dict

from ..layers import resample_pos_embed
from .layout import is_official, official_to_native

__all__ = ['fit_to_model', 'to_native']

_logger = logging.getLogger(__name__)

WRAPPERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model', 'module')  # averaged weights first, as timm does
POS_EMBED = 'stages.2.pos_embed'
CLASSIFIER = ('head.fc.weight', 'head.fc.bias')
CLASSIFIER_NORM = ('head.norm.weight', 'head.norm.bias')


def to_native(checkpoint: Dict[str, Any]) -> Dict[str, torch.Tensor]:
    """Unwrap a checkpoint and convert official names to native ones.

    Args:
        checkpoint: State dict in official or native layout, bare or wrapped (`WRAPPERS`, `module.` before keys).

    Raises:
        ValueError: It is not a Fast-iTPN checkpoint, or has keys of something else; the message lists them.
    """
    state_dict: Any = checkpoint
    while isinstance(state_dict, dict):
        inner = next((key for key in WRAPPERS if isinstance(state_dict.get(key), dict)), None)
        if inner is None:
            break
        state_dict = state_dict[inner]
    else:
        raise ValueError(f'This is not a checkpoint: it holds a {type(state_dict).__name__}, not a dict of tensors.')
    state_dict = clean_state_dict(state_dict)
    if any(key.startswith('stages.') for key in state_dict):
        return state_dict
    if is_official(state_dict):
        return official_to_native(state_dict)
    raise ValueError(f'This is not a Fast-iTPN checkpoint, its keys are: {_listed(list(state_dict))}.')


def fit_to_model(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Check native weights against a model and resample their position embedding to its grid.

    The classifier is not checked: whether it is kept or replaced is decided by timm, which has the numbers of classes.

    Args:
        state_dict: Native weights.
        model: The Fast-iTPN that they are for; read, not changed.

    Raises:
        ValueError: The weights are of another size, a key is unknown, or one is missing; the message lists them.
    """
    target = model.state_dict()
    _check_architecture(state_dict, target)
    state_dict = dict(state_dict)
    has_classifier = any(key in state_dict for key in CLASSIFIER)
    if has_classifier and CLASSIFIER[0] not in target:
        _logger.info('Left out the classifier: the model has none.')
        state_dict = {key: value for key, value in state_dict.items() if key not in CLASSIFIER}
    if not has_classifier and not any(key in state_dict for key in CLASSIFIER_NORM):
        _logger.info('The checkpoint is of pre-training, it has no classifier: norm and classifier start new.')
        state_dict.update({key: target[key] for key in CLASSIFIER_NORM if key in target})

    unknown = [key for key in state_dict if key not in target and key not in CLASSIFIER]
    missing = [key for key in target if key not in state_dict and key not in CLASSIFIER]
    if unknown or missing:
        raise ValueError(_mismatch(unknown, missing))
    state_dict[POS_EMBED] = _resampled_pos_embed(state_dict[POS_EMBED], model)
    return state_dict


def _check_architecture(state_dict: Dict[str, torch.Tensor], target: Dict[str, torch.Tensor]) -> None:
    (file_depths, file_dim), (depths, dim) = _architecture(state_dict), _architecture(target)
    if (file_depths, file_dim) != (depths, dim):
        raise ValueError(
            f'The checkpoint is a Fast-iTPN with depths {file_depths} and embed_dim {file_dim}, but the model has '
            f'depths {depths} and embed_dim {dim}: create the model that fits the file.')


def _architecture(state_dict: Dict[str, torch.Tensor]) -> Tuple[List[int], int]:
    blocks = {match.groups() for key in state_dict if (match := re.match(r'stages\.(\d)\.blocks\.(\d+)\.', key))}
    depths = [sum(stage == str(i) for stage, _ in blocks) for i in range(3)]
    return depths, state_dict[POS_EMBED].shape[-1] if POS_EMBED in state_dict else 0


def _mismatch(unknown: List[str], missing: List[str]) -> str:
    parts = []
    if missing:
        parts.append(f'it lacks {_listed(missing)}')
    if unknown:
        parts.append(f'the model has no {_listed(unknown)}')
    message = f'The checkpoint does not fit the model: {", and ".join(parts)}.'
    if any(key.endswith('.gamma') for key in missing):
        message += ' The file has no layer scale; a model without it is created with init_values=0.'
    elif any(key.endswith('.gamma') for key in unknown):
        message += ' The file has layer scale, which is ruined without it; create the model with init_values=0.1.'
    return message


def _resampled_pos_embed(pos_embed: torch.Tensor, model: Any) -> torch.Tensor:
    old_size = _source_grid(pos_embed.shape[1], model)
    return resample_pos_embed(pos_embed, new_size=list(model.patch_embed.grid_size), old_size=list(old_size))


def _source_grid(num_tokens: int, model: Any) -> Tuple[int, int]:
    """Grid of a position embedding: the first that has so many tokens of the file's metadata, the model's, a square."""
    cfg, args = getattr(model, 'pretrained_cfg', {}), getattr(model, 'pretrained_model_args', {})
    sizes = [to_2tuple(size) for size in (args.get('img_size'), cfg.get('input_size', ())[-2:]) if size]
    grids = [(height // 16, width // 16) for height, width in sizes]
    grids += [model.patch_embed.grid_size, (math.isqrt(num_tokens), math.isqrt(num_tokens))]
    for height, width in grids:
        if height * width == num_tokens:
            return height, width
    raise ValueError(
        f'The position embedding has {num_tokens} tokens, which is no square grid: give the image size that it was '
        'trained at with pretrained_cfg_overlay=dict(input_size=(3, height, width)).')


def _listed(keys: List[str], most: int = 8) -> str:
    more = f' and {len(keys) - most} more' if len(keys) > most else ''
    return ', '.join(keys[:most]) + more

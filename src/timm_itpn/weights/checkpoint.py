"""From whatever a checkpoint file holds to a state dict that fits a model, with nothing dropped in silence."""
import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import clean_state_dict

from ..layers.pos_embed import resample_pos_embed
from ..layers.rel_pos_bias import resample_table
from .layout import (
    PRETRAIN,
    PYRAMID,
    current_names,
    layout_of,
    native_depths,
    native_layout,
    native_pyramid_depth,
    official_to_native,
    pretraining_part,
)

__all__ = ['AVERAGED', 'PLAIN', 'architecture', 'fit_to_model', 'leave_out', 'to_native', 'unwrap']

_logger = logging.getLogger(__name__)

StateDict = dict[str, torch.Tensor]

AVERAGED = ('state_dict_ema', 'model_ema')
PLAIN = ('state_dict', 'model', 'module')
MAX_WRAPPERS = 8
POS_EMBED = 'stages.2.pos_embed'
TABLE = '.relative_position_bias_table'
CLASSIFIER = ('head.fc.weight', 'head.fc.bias')
CLASSIFIER_NORM = ('head.norm.weight', 'head.norm.bias')


def unwrap(checkpoint: Any, wrappers: tuple[str, ...] = AVERAGED + PLAIN) -> tuple[StateDict, str]:
    """Find the state dict in a checkpoint.

    Args:
        checkpoint: What a file holds.
        wrappers: Keys that may hold it, the preferred ones first: averaged weights, as timm does.

    Returns:
        State dict without `module.` before its keys, and the dotted names of what it was in, '' for nothing.

    Raises:
        ValueError: There is none.
    """
    names: list[str] = []
    state_dict = checkpoint
    for _ in range(MAX_WRAPPERS):  # a dict may hold itself
        if not isinstance(state_dict, dict):
            break
        inner = next((key for key in wrappers if isinstance(state_dict.get(key), dict)), None)
        if inner is None and not all(isinstance(key, str) for key in state_dict):
            raise ValueError('This is not a checkpoint: it holds a dict whose keys are no names.')
        if inner is None:
            return clean_state_dict(state_dict), '.'.join(names)
        names.append(inner)
        state_dict = state_dict[inner]
    if isinstance(state_dict, dict):
        raise ValueError(f'This is not a checkpoint: its dicts lie in one another {MAX_WRAPPERS} levels deep.')
    raise ValueError(f'This is not a checkpoint: it holds a {type(state_dict).__name__}, not a dict of tensors.')


def to_native(checkpoint: dict[str, Any]) -> StateDict:
    """Unwrap a checkpoint and convert official names to native ones.

    Args:
        checkpoint: State dict in official or native layout, bare or wrapped.

    Raises:
        ValueError: It is not of a model of this package, or has keys of something else; the message lists them.
    """
    state_dict, _ = unwrap(checkpoint)
    layout = layout_of(state_dict)
    if layout == 'official' or layout and POS_EMBED in state_dict:
        other = [key for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
        if other:
            raise ValueError(f'The checkpoint has entries that are no tensors: {_listed(other)}.')
        native = current_names(state_dict) if layout == 'native' else official_to_native(state_dict)
        if POS_EMBED in native and native[POS_EMBED].ndim != 3:
            raise ValueError(f'The position embedding has {native[POS_EMBED].ndim} dimensions, not 3.')
        return native
    found = f'its keys are: {_listed(list(state_dict))}' if state_dict else 'it is empty'
    raise ValueError(f'This is not a checkpoint of Fast-iTPN, iTPN or HiViT, {found}.')


def fit_to_model(state_dict: StateDict, model: Any, strict: bool = True) -> StateDict:
    """Check native weights against a model, and resample their position embeddings to its grid.

    The classifier is not checked: whether it is kept or replaced is decided by timm, which has the numbers of classes.

    Args:
        state_dict: Native weights.
        model: The model that they are for; read, not changed.
        strict: False = only resample, and leave out what the model never has; the rest is for the caller to check.

    Raises:
        ValueError: `strict`, and the weights are of another family or size, a key is unknown, or one is missing; the
            message lists them.
    """
    target = model.state_dict()
    if strict:
        _check_architecture(state_dict, target)
    if POS_EMBED in state_dict:
        old_grid = _source_grid(state_dict[POS_EMBED].shape[1], model)
        new_grid = model.patch_embed.grid_size
        state_dict = {key: _resampled(key, value, old_grid, new_grid) for key, value in state_dict.items()}
    state_dict = leave_out(state_dict, target)
    if not strict:
        return state_dict
    state_dict = _fit_head(state_dict, target)
    state_dict = _fit_pyramid(state_dict, target, model.pyramid_init)
    unknown = [key for key in state_dict if key not in target and key not in CLASSIFIER]
    missing = [key for key in target if key not in state_dict and key not in CLASSIFIER]
    if unknown or missing:
        raise ValueError(_mismatch(unknown, missing, target))
    return state_dict


def leave_out(state_dict: StateDict, target: StateDict) -> StateDict:
    """Leave out what only pre-training needs, and a pyramid that the model has no place for; the log says so."""
    left = [key for key in _starting(PRETRAIN, state_dict) if key not in target]
    if left:
        layout = native_layout(state_dict)
        parts = sorted({pretraining_part(key.removeprefix(PRETRAIN), layout) or 'unknown' for key in left})
        _logger.info(f'Left out {len(left)} tensors that only pre-training needs ({", ".join(parts)}).')
    if not _starting(PYRAMID, target) and _starting(PYRAMID, state_dict):
        _logger.info('Left out the feature pyramid: the model has none (its _fpn form with features_only=True does).')
        left += _starting(PYRAMID, state_dict)
    return {key: value for key, value in state_dict.items() if key not in left}


def _fit_head(state_dict: StateDict, target: StateDict) -> StateDict:
    """Leave out a classifier that the model has no place for; let what a pre-training file lacks start new."""
    if any(key in state_dict for key in CLASSIFIER):
        if CLASSIFIER[0] not in target:
            _logger.info('Left out the classifier: the model has none.')
            return {key: value for key, value in state_dict.items() if key not in CLASSIFIER}
        return state_dict
    if any(key in state_dict for key in CLASSIFIER_NORM):
        return state_dict
    _logger.info('The checkpoint is of pre-training, it has no classifier: norm and classifier start new.')
    new = {key: target[key] for key in CLASSIFIER_NORM if key in target}
    tables = [key for key in target if key.endswith(TABLE)]
    if tables and not any(key.endswith(TABLE) for key in state_dict):
        _logger.info('Its model had no relative position bias: the tables start at zero.')
        new.update({key: torch.zeros_like(target[key]) for key in tables})
    return {**state_dict, **new}


def _fit_pyramid(state_dict: StateDict, target: StateDict, pyramid_init: str) -> StateDict:
    """Check the pyramid, or let one start new if that is asked for."""
    in_file, in_model = _starting(PYRAMID, state_dict), _starting(PYRAMID, target)
    if in_model and not in_file:
        if pyramid_init != 'random':
            raise ValueError(
                "The checkpoint has no feature pyramid: use a pre-training file, or pass pyramid_init='random' for a "
                'pyramid that starts new.')
        _logger.info('The checkpoint has no feature pyramid: it starts new, as asked for by pyramid_init.')
        return {**state_dict, **{key: target[key] for key in in_model}}
    if _pyramid_sizes(state_dict) != _pyramid_sizes(target):
        file_sizes, sizes = (', '.join(f'{k} {v}' for k, v in _pyramid_sizes(d).items()) for d in (state_dict, target))
        raise ValueError(
            f"The checkpoint's pyramid has {file_sizes}, but the model's has {sizes}: create the model with "
            'pyramid_dim= and pyramid_depth= that fit the file.')
    return state_dict


def _pyramid_sizes(state_dict: StateDict) -> dict[str, int]:
    weight = state_dict.get('pyramid.levels.2.out.mlp.fc1.weight')
    hidden, dim = (0, 0) if weight is None else weight.shape
    return {'dim': dim, 'depth': native_pyramid_depth(state_dict), 'hidden width': hidden}


def _check_architecture(state_dict: StateDict, target: StateDict) -> None:
    file, model = architecture(state_dict), architecture(target)
    if file != model:
        raise ValueError(
            f'The checkpoint is of {file}, but the model is of {model}: create the model that fits the file.')


def architecture(state_dict: StateDict) -> str:
    """Family and size of native weights, in words."""
    embed_dim = state_dict[POS_EMBED].shape[-1] if POS_EMBED in state_dict else 0
    depths = list(native_depths(state_dict))
    return f'{native_layout(state_dict).family} with depths {depths} and embed_dim {embed_dim}'


def _mismatch(unknown: list[str], missing: list[str], target: StateDict) -> str:
    def lacks_all(end: str) -> bool:
        keys = [key for key in target if key.endswith(end)]
        return bool(keys) and set(keys) <= set(missing)

    parts = []
    if missing:
        parts.append(f'it lacks {_listed(missing)}')
    if unknown:
        parts.append(f'the model has no {_listed(unknown)}')
    message = f'The checkpoint does not fit the model: {", and ".join(parts)}.'
    if lacks_all('.gamma'):
        message += ' The file has no layer scale; a model without it is created with init_values=0.'
    elif any(key.endswith('.gamma') for key in unknown):
        message += ' The file has layer scale, which is ruined without it; create the model with init_values=0.1.'
    if lacks_all(TABLE):
        message += ' The file has no relative position bias; a model without it is created with rel_pos_bias=False.'
    elif any(key.endswith(TABLE) for key in unknown):
        message += ' The file has relative position bias; create the model with rel_pos_bias=True.'
    return message


def _resampled(key: str, value: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Resample a position embedding to another grid; other tensors come back as they are."""
    if key == POS_EMBED:
        return resample_pos_embed(value, new_size=list(new_grid), old_size=list(old_grid))
    if not key.endswith(TABLE) or old_grid == new_grid:
        return value
    old_height, old_width = old_grid
    if len(value) != (2 * old_height - 1) * (2 * old_width - 1):
        raise ValueError(f'{key} has {len(value)} rows, the position embedding {old_height} x {old_width} tokens.')
    return resample_table(value, new_grid, old_grid)


def _source_grid(num_tokens: int, model: Any) -> tuple[int, int]:
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


def _starting(start: str, keys: Iterable[str]) -> list[str]:
    return [key for key in keys if key.startswith(start)]


def _listed(keys: list[str], most: int = 8) -> str:
    more = f' and {len(keys) - most} more' if len(keys) > most else ''
    return ', '.join(keys[:most]) + more

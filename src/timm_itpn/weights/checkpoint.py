"""From what a checkpoint file holds to a state dict that fits a model, with nothing dropped in silence."""
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from timm.layers import to_2tuple

from ..layers.rel_pos_bias import resample_table
from ..layers.stages import resample_pos_embed
from .describe import describe, part_of
from .layout import (
    CLASSIFIER,
    CLASSIFIER_NORM,
    POS_EMBED,
    PRETRAIN,
    PYRAMID,
    TABLE,
    TRACKING,
    find_prefixes,
    layout_of,
    native_pyramid_depth,
    to_current,
)

_logger = logging.getLogger(__name__)

StateDict = dict[str, torch.Tensor]

AVERAGED = ('state_dict_ema', 'model_ema')
PLAIN = ('state_dict', 'model', 'module')
MAX_WRAPPERS = 8


def unwrap(checkpoint: Any, averaged: bool = True, prefix: str | None = None) -> tuple[StateDict, str]:
    """Find the network of this package in a checkpoint, whatever dicts and prefixes it is under.

    Args:
        checkpoint: What a file holds.
        averaged: Prefer averaged weights to plain ones, as timm does. Dicts under other keys than `AVERAGED` and
            `PLAIN` come last.
        prefix: Where in the checkpoint it is, such as 'net.backbone' or 'backbone', needed only if several networks
            are there.

    Returns:
        Tensors of the network without the prefix of their keys, and the dotted names of what they were under, '' for
        nothing. If there is no network of this package, the dict with the most tensors.

    Raises:
        ValueError: There are several networks and `prefix` does not choose one, or there is no dict of tensors.
    """
    found = list(_dicts(checkpoint, AVERAGED + PLAIN if averaged else PLAIN + AVERAGED))
    networks = [each for each in found if each.num_left is not None]
    if prefix is None:
        chosen = [network for network in networks if network.rank == min(each.rank for each in networks)]
    else:
        end = prefix.strip('.')
        chosen = [network for network in networks if network.path == end]
        chosen = chosen or [network for network in networks if f'.{network.path}'.endswith(f'.{end}')]
        if not chosen:
            raise ValueError(
                f'The checkpoint has no network under the prefix {prefix!r}, only under: {_paths(networks)}.')
    if len(chosen) > 1:
        raise ValueError(
            f'The checkpoint has {len(chosen)} networks, under {_paths(chosen)}: choose one with '
            '`timm-itpn convert --prefix`, or in Python with to_native(..., prefix=).')
    if not isinstance(checkpoint, dict):
        raise ValueError(f'This is not a checkpoint: it holds a {type(checkpoint).__name__}, not a dict of tensors.')
    network, = chosen or [max(found, key=lambda each: len(each.state_dict), default=_Dict({}, '', (), None))]
    if network.num_left:
        _logger.info(f'Took the network under {network.path!r}; left out {network.num_left} other tensors.')
    return network.state_dict, network.path


class _Dict(NamedTuple):
    """Tensors in a checkpoint."""
    state_dict: StateDict  # by their keys without prefix
    path: str  # dotted names of the dicts that they are in, and the prefix of their keys
    rank: tuple[int, ...]  # of each of these dicts, how much it is preferred
    num_left: int | None  # tensors beside them that have another prefix, None if they are no network of this package


def _dicts(tree: Any, wrappers: tuple[str, ...], path: str = '', rank: tuple[int, ...] = ()) -> Iterator[_Dict]:
    """All networks, and dicts of other tensors; `wrappers` are the usual keys, the preferred ones first."""
    if not isinstance(tree, dict) or len(rank) > MAX_WRAPPERS:  # a dict may hold itself
        return
    tensors = {key: value for key, value in tree.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    prefixes = find_prefixes(tensors)
    for prefix in prefixes:
        others = tuple(other for other in prefixes if other.startswith(prefix) and other != prefix)
        state_dict = {
            key.removeprefix(prefix): value for key, value in tensors.items()
            if key.startswith(prefix) and not key.startswith(others)}
        num_left = len(tensors) - len(state_dict) if prefix else 0
        yield _Dict(state_dict, f'{path}{prefix}'.strip('.'), rank, num_left)
    if tensors and not prefixes:
        yield _Dict(tensors, path.strip('.'), rank, None)
    for key, value in tree.items():
        place = wrappers.index(key) if key in wrappers else len(wrappers)
        yield from _dicts(value, wrappers, f'{path}{key}.', (*rank, place))


def _paths(networks: list[_Dict]) -> str:
    return ', '.join(repr(network.path) for network in networks) or 'none'


def to_native(checkpoint: dict[str, Any], prefix: str | None = None) -> StateDict:
    """Find the network in a checkpoint and convert official names to native ones.

    Args:
        checkpoint: State dict in official or native layout, bare, wrapped, or under a prefix.
        prefix: Where the network is, needed only if there are several; see `unwrap`.

    Raises:
        ValueError: It is not of a model of this package, or has keys of something else; the message lists them.
    """
    state_dict, _ = unwrap(checkpoint, prefix=prefix)
    layout = layout_of(state_dict)
    if layout == 'official' or layout and POS_EMBED in state_dict:
        return to_current(state_dict)
    found = f'its keys are: {listed(list(state_dict))}' if state_dict else 'it holds no tensors'
    if layout and any(key.startswith('pos_embed.') for key in state_dict):
        found = 'it is of a tracking.JointEncoder, whose `load` reads it'
    raise ValueError(f'This is not a checkpoint of Fast-iTPN, iTPN or HiViT: {found}.')


def fit_to_model(state_dict: StateDict, model: Any) -> StateDict:
    """Check native weights against a model, and resample their position embeddings to its grid.

    The classifier is not checked: whether it is kept or replaced is decided by timm, which has the numbers of classes.

    Args:
        state_dict: Native weights.
        model: The model that they are for; read, not changed.

    Raises:
        ValueError: The weights are of another family or size, a key is unknown, or one is missing, the message lists
            them; or a tensor is of another shape, not of a floating-point type, or not finite.
    """
    target = model.state_dict()
    if (file := describe(state_dict).network) != (own := describe(target).network):
        raise ValueError(f'The checkpoint is of {file}, but the model is of {own}: create one that fits the file.')
    state_dict = leave_out(fit_positions(state_dict, model), target)
    state_dict = _fit_head(state_dict, target)
    state_dict = _fit_pyramid(state_dict, target, model.pyramid_init)
    unknown = [key for key in state_dict if key not in target and key not in CLASSIFIER]
    missing = [key for key in target if key not in state_dict and key not in CLASSIFIER]
    if unknown or missing:
        raise ValueError(_mismatch(unknown, missing, target))
    for key, value in state_dict.items():
        if key in target and _fixed_shape(key, value) != _fixed_shape(key, target[key]):
            raise ValueError(
                f'{key} is {tuple(value.shape)} in the checkpoint, but {tuple(target[key].shape)} in the model: the '
                'checkpoint is damaged, or of another model.')
    if wrong := why_no_weights(state_dict):
        raise ValueError(f'{wrong}: the checkpoint is damaged, or of a training that went wrong.')
    return state_dict


def _fixed_shape(key: str, value: torch.Tensor) -> list[int]:
    """The shape without the dimension that timm adapts: classes of the classifier, image channels of the stem."""
    dim = {**dict.fromkeys(CLASSIFIER, 0), 'patch_embed.proj.weight': 1}.get(key)
    return [length for i, length in enumerate(value.shape) if i != dim]


def why_no_weights(state_dict: StateDict) -> str:
    """Why tensors cannot be weights, as a sentence without its end; '' if they can. Those without data do."""
    for key, value in state_dict.items():
        if not value.is_floating_point():
            return f'{key} is of {value.dtype}, not of a floating-point type'
        if type(value) in (torch.Tensor, torch.nn.Parameter) and not value.is_meta and value.itemsize > 1:
            # the sum is fast, and enough unless it overflows
            if not value.sum(dtype=torch.float32).isfinite() and not value.isfinite().all():
                return f'{key} has values that are infinite or not a number'
    return ''


def leave_out(state_dict: StateDict, target: StateDict) -> StateDict:
    """Leave out what only pre-training needs, and pyramid and tables that the model is without; the log says so."""
    left = [key for key in _starting(PRETRAIN, state_dict) if key not in target]
    if left:
        parts = sorted({part_of(key, state_dict) for key in left})
        _logger.info(f'Left out {len(left)} tensors that only pre-training needs ({", ".join(parts)}).')
    if own := _starting(TRACKING, state_dict):
        _logger.info(f"Left out {len(own)} tensors that are a tracker's own: `JointEncoder.load` gives them.")
        left += own
    if not _starting(PYRAMID, target) and _starting(PYRAMID, state_dict):
        _logger.info('Left out the feature pyramid: the model has none (its _fpn form with features_only=True does).')
        left += _starting(PYRAMID, state_dict)
    tables = [key for key in state_dict if key.endswith(TABLE) and key not in left]
    if tables and not any(key.endswith(TABLE) for key in target):
        _logger.warning('Left out the relative position bias: the model has none (rel_pos_bias=False).')
        left += tables
    return {key: value for key, value in state_dict.items() if key not in left}


def _fit_head(state_dict: StateDict, target: StateDict) -> StateDict:
    """Leave out a classifier that the model has no place for; let what a pre-training file lacks start new."""
    has_classifier = any(key in state_dict for key in CLASSIFIER)
    if has_classifier and CLASSIFIER[0] not in target:
        _logger.info('Left out the classifier: the model has none.')
        return {key: value for key, value in state_dict.items() if key not in CLASSIFIER}
    if has_classifier or any(key in state_dict for key in CLASSIFIER_NORM):
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
    if (file := _pyramid_sizes(state_dict)) != (own := _pyramid_sizes(target)):
        raise ValueError(
            f"The checkpoint's pyramid has {file}, but the model's has {own}: create the model with pyramid_dim= and "
            'pyramid_depth= that fit the file.')
    return state_dict


def _pyramid_sizes(state_dict: StateDict) -> str:
    weight = state_dict.get('pyramid.levels.2.out.mlp.fc1.weight')
    hidden, dim = (0, 0) if weight is None else weight.shape
    return f'dim {dim}, depth {native_pyramid_depth(state_dict)}, hidden width {hidden}'


def _mismatch(unknown: list[str], missing: list[str], target: StateDict) -> str:
    differences = [f'it lacks {listed(missing)}'] if missing else []
    differences += [f'the model has no {listed(unknown)}'] if unknown else []
    message = f'The checkpoint does not fit the model: {", and ".join(differences)}.'
    for end, what, without in (
            ('.gamma', 'layer scale', 'init_values=0'), (TABLE, 'relative position bias', 'rel_pos_bias=False')):
        if (wanted := {key for key in target if key.endswith(end)}) and wanted <= set(missing):
            message += f' The file has no {what}; a model without it is created with {without}.'
    if any(key.endswith('.gamma') for key in unknown):
        message += ' The file has layer scale, and is of no use without it; create the model with init_values=0.1.'
    return message


def fit_positions(state_dict: StateDict, model: Any) -> StateDict:
    """Resample native position embeddings, and the tables of relative positions, to a model's grid.

    Raises:
        ValueError: Their grid cannot be told, or tables and position embedding are of different grids.
    """
    if POS_EMBED not in state_dict:
        return state_dict
    old_grid, new_grid = _source_grid(state_dict[POS_EMBED].shape[1], model), model.patch_embed.grid_size
    if old_grid == new_grid:
        return state_dict
    height, width = old_grid
    resampled = dict(state_dict)
    for key, value in state_dict.items():
        if key == POS_EMBED:
            resampled[key] = resample_pos_embed(value, new_size=list(new_grid), old_size=list(old_grid))
        elif key.endswith(TABLE):
            if len(value) != (2 * height - 1) * (2 * width - 1):
                raise ValueError(f'{key} has {len(value)} rows, the position embedding {height} x {width} tokens.')
            resampled[key] = resample_table(value, new_grid, old_grid)
    return resampled


def _source_grid(num_tokens: int, model: Any) -> tuple[int, int]:
    """Grid of a position embedding: the first that has so many tokens of the file's metadata, the model's, a square."""
    cfg, args = getattr(model, 'pretrained_cfg', {}), getattr(model, 'pretrained_model_args', {})
    sizes = [to_2tuple(size) for size in (args.get('img_size'), cfg.get('input_size', ())[-2:]) if size]
    grids = [(height // 16, width // 16) for height, width in sizes]
    grids += [model.patch_embed.grid_size, (math.isqrt(num_tokens), math.isqrt(num_tokens))]
    for height, width in grids:
        if height * width == num_tokens:
            own = model.patch_embed.grid_size
            if own[0] * own[1] == num_tokens and own != (height, width):
                _logger.warning(
                    f'The position embedding is taken for {height} x {width} tokens, not {own[0]} x {own[1]} as in the '
                    'model: if that is wrong, pass pretrained_cfg_overlay=dict(input_size=(3, height, width)) with the '
                    'size of the images that it was trained on.')
            return height, width
    raise ValueError(
        f'The position embedding has {num_tokens} tokens, which is not a square grid: give the image size that it was '
        'trained at with pretrained_cfg_overlay=dict(input_size=(3, height, width)).')


def _starting(start: str, keys: Iterable[str]) -> list[str]:
    return [key for key in keys if key.startswith(start)]


def listed(keys: list[str], most: int = 8) -> str:
    more = f' and {len(keys) - most} more' if len(keys) > most else ''
    return ', '.join(keys[:most]) + more

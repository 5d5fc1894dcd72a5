"""A weight file of any layout, or a converted folder, opened to be converted: what it holds, what it says of itself."""
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import is_model_in_modules

from ..models import MODULES
from ..weights.checkpoint import AVERAGED, PLAIN, StateDict, to_native, unwrap
from ..weights.describe import Description, describe
from ..weights.layout import TRACKING, layout_of
from ..weights.read import read_contents
from ..weights.sources import check_published, plain_name, sha256_of
from ..weights.tracker import tracker_to_native
from .settings import Settings, from_config, from_training

__all__ = ['CONFIG', 'WEIGHTS', 'Checkpoint', 'open_checkpoint']

WEIGHTS, CONFIG = 'model.safetensors', 'config.json'  # of timm's Hub folders


class Checkpoint(NamedTuple):
    """An open weight file."""
    path: Path  # the file
    source: dict[str, Any]  # what it is, for JSON
    state_dict: StateDict  # in the file's layout and the type asked for
    native: StateDict  # the same in native layout
    weights: Description  # what they are
    name: str  # model that the file says it is of: a converted one, or one of timm's `train.py`; '' if it does not say
    published: bool  # whether this may be a published file, or one converted from it
    said: Settings  # what the folder's config, or the arguments of timm's `train.py`, say beside the weights
    img_size: tuple[int, int] | None  # height and width that were asked for, or that the file says if they fit


def open_checkpoint(
        path: Path,
        dtype: torch.dtype | None = None,
        ema: bool = False,
        img_size: tuple[int, int] | None = None,
        prefix: str | None = None,
        roles: Mapping[str, tuple[int, int]] | None = None,
) -> Checkpoint:
    """Open a weight file without running its pickled code; tensors are read when they are needed.

    Args:
        path: File, or folder that holds `model.safetensors`.
        dtype: Type of the weights, None for that of the file.
        ema: Take the averaged weights; the plain ones are taken otherwise, if there are both.
        img_size: Height and width in pixels that the position embedding is for, None for a square or what the folder
            says.
        prefix: Which of several networks to take, see `weights.checkpoint.unwrap`.
        roles: Of a tracker's file, see `weights.tracker.tracker_to_native`.

    Raises:
        ValueError: It cannot be read, is damaged, or holds no weights of a model of this package, no averaged ones,
            several networks, or values too large for `dtype`.
    """
    path = path / WEIGHTS if path.is_dir() else path
    contents = read_contents(path)
    check_published(path)
    tree, metadata = contents.tree, contents.metadata
    state_dict, wrapper = unwrap(tree, ema, prefix)
    if ema and not set(wrapper.split('.')) & set(AVERAGED):
        raise ValueError(f'{path} has no averaged weights ({" or ".join(AVERAGED)}): leave out --ema.')
    state_dict = _cast(state_dict, dtype)
    native = to_native(tracker_to_native(state_dict, roles))
    weights = describe(native)

    config = path.with_name(CONFIG)
    has_config = path.name == WEIGHTS and config.is_file()
    said = from_config(config) if has_config else from_training(metadata.get('args', tree.get('args')))
    layout, trained_as = layout_of(state_dict), plain_name(said.model.partition('.')[0])
    is_ours = layout == 'native' and is_model_in_modules(trained_as, MODULES)
    name = metadata.get('model', '') or (trained_as if is_ours else '')
    of_tracker = any(key.startswith(TRACKING) for key in native)
    height, width = said.img_size or (0, 0)
    if roles:
        img_size = next(iter(roles.values()))
    elif img_size is None and (height // 16) * (width // 16) == weights.num_tokens:
        img_size = (height, width)

    wrappers = [key for key in AVERAGED + PLAIN if isinstance(tree.get(key), dict)]
    origin = {key: metadata.get(entry, '') for key, entry in (('file', 'source'), ('sha256', 'source_sha256'))}
    source = dict(
        file=path.name,
        sha256=sha256_of(path),
        bytes=path.stat().st_size,
        layout=layout,
        wrapper=wrapper,  # dotted names of the dicts and the prefix that the state dict was under, '' for nothing
        others=[key for key in wrappers if key != wrapper.partition('.')[0]],  # names of other state dicts
        origin=origin if all(origin.values()) else None,  # what a converted file says it was made of
    )
    published = not of_tracker and (layout == 'official' or '.' in name)
    return Checkpoint(path, source, state_dict, native, weights, name, published, said, img_size)


def _cast(state_dict: StateDict, dtype: torch.dtype | None) -> StateDict:
    if dtype is None:
        return state_dict
    cast = dict(state_dict)
    for key, value in state_dict.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            cast[key] = value.to(dtype)
            if not cast[key].isfinite().all() and value.isfinite().all():
                raise ValueError(f'{key} has values that {dtype} cannot hold: choose another --dtype.')
    return cast

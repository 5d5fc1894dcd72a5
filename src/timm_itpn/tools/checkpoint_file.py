"""A weight file of any layout, or a converted folder, opened to be converted: what it holds, what it says of itself.

Beside weights it may say how images were prepared and how its model was created: timm's `train.py` leaves its arguments
in the file, a converted folder has a config. Both may be from anyone, so values are checked, and nothing that would
load or fetch a file is taken.
"""
import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import is_model_in_modules

from ..checks import are_numbers, is_number, read_text
from ..models import MODULES
from ..weights.checkpoint import AVERAGED, PLAIN, StateDict, to_native, unwrap
from ..weights.describe import Description, describe
from ..weights.layout import TRACKING, layout_of
from ..weights.read import Contents, StandIn, read_contents
from ..weights.sources import check_published, plain_name, sha256_of
from ..weights.tracker import tracker_to_native

WEIGHTS, CONFIG = 'model.safetensors', 'config.json'  # of timm's Hub folders
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
CROP_MODES = ('center', 'squash', 'border')
LARGEST_SIDE = 2 ** 16  # pixels
Size = tuple[int, int]  # height and width, pixels

# what the outputs depend on, and neither names nor shapes of the weights tell; the last two say that they tell the size
MODEL_ARGS = (
    'num_heads', 'stem_mlp_ratio', 'mlp_ratio', 'act_layer', 'norm_layer', 'global_pool', 'dynamic_img_size',
    'dynamic_img_pad', 'acceleration', 'gather_window', 'gather_blocks', 'migrate', 'carry', 'pyramid_pool',
    'pyramid_concat', 'embed_dim', 'depths')
LABELS = ('label_names', 'label_descriptions')
# setting -> whether a value can be one, and what it must be
DATA: dict[str, tuple[Callable[[Any], bool], str]] = {
    'crop_pct': (lambda value: is_number(value, 0.1, 2), 'a number from 0.1 to 2'),
    'mean': (lambda value: are_numbers(value, -1e3, 1e3), 'a number for each channel'),
    'std': (lambda value: are_numbers(value, 1e-6, 1e3), 'a number above 0 for each channel'),
    'interpolation': (lambda value: value in INTERPOLATIONS, f'one of {", ".join(INTERPOLATIONS)}'),
    'crop_mode': (lambda value: value in CROP_MODES, f'one of {", ".join(CROP_MODES)}'),
}


class Settings(NamedTuple):
    """What is said beside the weights."""
    source: str  # where, in words
    data: dict[str, Any] = {}  # of timm's data config, by the names in `DATA`
    model: str = ''  # name of the model, perhaps with tag
    model_args: dict[str, Any] = {}  # by the names in `MODEL_ARGS`
    img_size: Size | None = None  # height and width that the model was created for
    input_size: Size | None = None  # of the images, if they may differ
    labels: dict[str, Any] = {}  # names of the classes, as timm's config has them
    class_map: str = ''  # the file of the names of the classes, '' for none


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
    img_size: Size | None  # height and width that were asked for, or that the file says if they fit


def open_checkpoint(
        path: Path,
        dtype: torch.dtype | None = None,
        ema: bool = False,
        img_size: Size | None = None,
        prefix: str | None = None,
        roles: Mapping[str, Size] | None = None,
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

    layout, said = layout_of(state_dict), settings_of(path, contents)
    name = model_named(contents, layout, said)
    of_tracker = any(key.startswith(TRACKING) for key in native)
    img_size = size_for(weights, roles, img_size, said)

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


def check_data(data: dict[str, Any], in_chans: int, source: str) -> None:
    """Raise ValueError for a value that timm could not prepare images with.

    Args:
        data: Settings by the names in `DATA`.
        in_chans: Channels of the images.
        source: Where they are from, in words.
    """
    for key, value in data.items():
        is_valid, expected = DATA[key]
        if not is_valid(value) or key in ('mean', 'std') and len(value) not in (1, in_chans):
            raise ValueError(
                f'{key} in {source} must be {expected}: give the right one with --{key.replace("_", "-")}.')


def settings_of(path: Path, contents: Contents) -> Settings:
    """What the folder's config, or what the file has of the arguments of timm's `train.py`, say beside the weights.

    Raises:
        ValueError: They cannot be read.
    """
    config, tree = path.with_name(CONFIG), contents.tree
    if path.name == WEIGHTS and config.is_file():
        return from_config(config)
    return from_training(contents.metadata.get('args', tree.get('args') if isinstance(tree, dict) else None))


def model_named(contents: Contents, layout: str, said: Settings) -> str:
    """The model that a file says it is of, by its header or, without tag, by the settings; '' if it does not say."""
    name = plain_name(said.model.partition('.')[0])
    is_ours = layout == 'native' and is_model_in_modules(name, MODULES)
    return contents.metadata.get('model', '') or (name if is_ours else '')


def size_for(
        weights: Description, roles: Mapping[str, Size] | None, asked: Size | None, said: Settings) -> Size | None:
    """Height and width that a position embedding is for: of the first role, as asked for, or as said if that fits."""
    if roles:
        return next(iter(roles.values()))
    height, width = said.img_size or (0, 0)
    return asked or (said.img_size if height // 16 * (width // 16) == weights.num_tokens else None)


def from_training(args: Any) -> Settings:
    """The arguments of timm's `train.py`, a `Namespace`, a dict or JSON; what is None or empty is the default.

    Raises:
        ValueError: The arguments of the model cannot be read.
    """
    source = "the checkpoint's args"
    with contextlib.suppress(RecursionError, TypeError, ValueError):
        args = json.loads(args)
    said = args if isinstance(args, dict) else vars(args) if isinstance(args, StandIn) else {}
    wanted = (*DATA, 'model', 'model_kwargs', 'gp', 'img_size', 'input_size', 'class_map')
    found: dict[str, Any] = {key: value for key in wanted if (value := _plain(said.get(key)))}
    kwargs = found.get('model_kwargs', {})
    if not isinstance(kwargs, dict):
        raise ValueError(f'model_kwargs in {source} cannot be read: convert a file with the state dict alone.')
    kwargs = {'global_pool': found.get('gp'), **kwargs}
    input_size = _size(found.get('img_size') or found.get('input_size'))
    return Settings(
        source=source,
        data={key: found[key] for key in DATA if key in found},
        model=str(found.get('model', '')),
        model_args={key: kwargs[key] for key in MODEL_ARGS if kwargs.get(key) is not None},
        img_size=_size(kwargs.get('img_size')) or input_size,
        input_size=input_size,
        class_map=str(found.get('class_map', '')),
    )


def from_config(path: Path) -> Settings:
    """The config of timm in a converted folder.

    Raises:
        ValueError: It is not one.
    """
    text = read_text(path)
    try:
        config = json.loads(text)
        cfg, kwargs = config.get('pretrained_cfg', {}), config.get('model_args', {})
        said = from_training({**cfg, 'model_kwargs': kwargs, 'gp': config.get('global_pool')})
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f'{path} is not a config of timm ({error}): mend it, or convert a copy.') from error
    labels = {key: value for key, value in config.items() if key in LABELS and isinstance(value, (list, dict))}
    return said._replace(source=path.name, labels=labels)


def class_names(path: Path, num_classes: int) -> list[str]:
    """The names in a class map of timm in text form, one per line.

    Raises:
        ValueError: They are not as many as the classes.
    """
    names = [line.strip() for line in read_text(path).splitlines()]
    if len(names) != num_classes:
        raise ValueError(f'{path} has {len(names)} lines, but the checkpoint {num_classes} classes: name another file.')
    return names


def _plain(value: Any) -> Any:
    """A value as JSON gives it back; Ellipsis, which no check lets pass, for what JSON cannot hold."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return ...


def _size(value: Any) -> Size | None:
    """Height and width from a side, (height, width) or (channels, height, width); None if it is something else."""
    sides = value if isinstance(value, list) else [value, value]
    is_size = len(sides) in (2, 3) and all(type(side) is int and 0 < side <= LARGEST_SIDE for side in sides)
    return (sides[-2], sides[-1]) if is_size else None

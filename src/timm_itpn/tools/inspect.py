"""What a weight file is to this package, told from its names and shapes, and from what it says of its model.

Nothing of the file is run and none of its tensors is read, so it may be from anyone. Text in it comes back as it is, to
be escaped before a terminal gets it.
"""
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..models import check_name
from ..weights.checkpoint import AVERAGED, StateDict, to_native, unwrap
from ..weights.describe import Description, describe
from ..weights.layout import layout_of
from ..weights.read import read_contents, stand_in_name
from ..weights.sources import hash_check, sha256_of
from ..weights.tracker import tracker_to_native
from .checkpoint_file import WEIGHTS, Settings, Size, model_named, settings_of, size_for
from .match import matching_models, model_args

MAX_KEYS = 8
MAX_TEXT = 200


def inspect(
        path: Path, name: str | None = None, prefix: str | None = None, roles: Mapping[str, Size] | None = None,
) -> dict[str, Any]:
    """What is in a weight file, for JSON.

    Args:
        path: File of any format, or folder that `convert` wrote.
        name: Model to compare it with, None to tell from the file.
        prefix: Which of several networks to look at, such as 'backbone'.
        roles: Of a tracker's file, see `weights.tracker.tracker_to_native`.

    Raises:
        ValueError: It cannot be read, or is not a weight file; or there is no model of that name.
    """
    if name is not None:
        check_name(name)
    path = path / WEIGHTS if path.is_dir() else path
    contents = read_contents(path, meta=True)
    tensors: StateDict = {}
    wrapper, layout, problem = '', '', ''
    found: dict[str, Any] = dict(network=None, parts={}, models=[])
    try:
        tensors, wrapper = unwrap(contents.tree, averaged=False, prefix=prefix)
        layout = layout_of(tensors)
        if layout:
            said = settings_of(path, contents)
            named = model_named(contents, layout, said)
            published = layout == 'official' and not roles or '.' in named
            name = name or named
            found = _network(to_native(tracker_to_native(tensors, roles)), name, published, roles, said)
            problem = '' if found['models'] else 'It fits no registered model.'
        else:
            problem = 'It fits no model of this package.' if tensors else 'It holds no named tensors.'
    except ValueError as error:
        problem = str(error)
    others = {entry: _summary(value) for entry, value in _others(contents.tree, wrapper, len(tensors))}
    fitting = [model['name'] for model in found['models'] if model['fits']]
    chosen = name or (fitting[0] if len(fitting) == 1 else None)
    sha256, origin = sha256_of(path), contents.metadata.get('source_sha256') if layout == 'native' else None
    told = f'says that it was converted from {origin}, which ' if origin else ''
    return {
        'file': str(path),
        'format': contents.format,
        'bytes': path.stat().st_size,
        'sha256': sha256,
        'hash_check': told + hash_check(origin or sha256, chosen),
        'metadata': contents.metadata,
        'globals': list(contents.globals),
        'wrapper': wrapper,
        'others': others,
        'num_tensors': len(tensors),
        'num_values': sum(value.numel() for value in tensors.values()),
        'dtypes': dict(Counter(_short(value.dtype) for value in tensors.values()).most_common()),
        'first_keys': [] if found['network'] else list(tensors)[:MAX_KEYS],
        'layout': layout,
        **found,
        'model': chosen,
        'problem': problem,
        'notes': [
            f"averaged weights in {key}: timm's loaders take those, convert does with --ema"
            for key in AVERAGED if others.get(key, '').startswith('dict')],
    }


def _others(tree: Any, wrapper: str, num_tensors: int, path: str = '') -> Iterator[tuple[str, Any]]:
    """Dotted name and value of each thing in the file that is not a tensor of the state dict."""
    if not isinstance(tree, dict):
        yield 'whole file', tree
        return
    dicts = [key for key, value in tree.items() if isinstance(key, str) and isinstance(value, dict)]
    inner = next((key for key in dicts if f'{wrapper}.'.startswith(f'{key}.')), None)
    tensors = set()
    if inner is None and num_tensors:
        tensors = {key for key, value in tree.items() if isinstance(value, torch.Tensor)}
    for key, value in tree.items():
        if key != inner and key not in tensors:
            yield path + (key if isinstance(key, str) else _summary(key)), value
    if inner is not None:
        yield from _others(tree[inner], wrapper[len(inner) + 1:], num_tensors, f'{path}{inner}.')
    elif len(tensors) > num_tensors:
        yield path + 'other tensors', len(tensors) - num_tensors


def _summary(value: Any) -> str:
    """What a value of the file is, in a few words."""
    if isinstance(value, torch.Tensor):
        return f'tensor {list(value.shape)} of {_short(value.dtype)}'
    if stand_in_name(value):
        return str(stand_in_name(value))
    for kind in (dict, list, tuple, set, frozenset):
        if isinstance(value, kind):
            num_tensors = _num_tensors(value)
            return f'{kind.__name__} of {len(value)}' + (f' (tensors: {num_tensors})' if num_tensors else '')
    if isinstance(value, (bytes, bytearray)):
        return f'{len(value)} bytes'
    if isinstance(value, int) and value.bit_length() > 64:  # Python does not write out those of 4,300 digits
        return f'integer of {value.bit_length()} bits'
    return str(value)[:MAX_TEXT]


def _num_tensors(tree: Any) -> int:
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return isinstance(tree, torch.Tensor) + sum(map(_num_tensors, children))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def _network(
        native: StateDict, name: str, published: bool, roles: Mapping[str, Size] | None, said: Settings,
) -> dict[str, Any]:
    """The network and the parts of native weights, and the models that they are compared with."""
    weights = describe(native)
    img_size = size_for(weights, roles, None, said)
    names = dict.fromkeys([*matching_models(weights, published), *([name] if name else [])])
    network = weights._asdict()
    parts = network.pop('parts')
    models = [_fit(each, native, weights, img_size, said.model_args) for each in names]
    return dict(network=network, parts=parts, models=models)


def _fit(
        name: str, native: StateDict, weights: Description, img_size: Size | None, told: dict[str, Any],
) -> dict[str, Any]:
    """Whether a model holds the weights, and what it needs to be told for that."""
    try:
        args = model_args(name, native, weights, img_size, told)
    except ValueError as error:
        return dict(name=name, fits=False, args={}, problem=str(error))
    args.pop('pretrained_cfg_overlay', None)
    return dict(name=name, fits=True, args=args, problem='')

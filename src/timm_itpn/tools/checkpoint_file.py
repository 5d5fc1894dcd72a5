"""A weight file of any layout, or a converted folder, opened to be converted: what it holds, what it says of itself."""
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..weights.checkpoint import AVERAGED, PLAIN, StateDict, to_native, unwrap
from ..weights.integrity import check_published, sha256_of
from ..weights.layout import layout_of
from ..weights.read import read_contents

__all__ = ['CONFIG', 'WEIGHTS', 'Checkpoint', 'open_checkpoint']

WEIGHTS, CONFIG = 'model.safetensors', 'config.json'  # of timm's Hub folders


class Checkpoint(NamedTuple):
    """An open weight file."""
    path: Path  # the file
    layout: str  # 'official' or 'native'
    wrapper: str  # dotted names of the dicts and the prefix that the state dict was under, '' for nothing
    others: list[str]  # names of other state dicts in the file
    state_dict: StateDict  # in the file's layout and the type asked for
    native: StateDict  # the same in native layout
    name: str  # model that a converted file says it is of, '' for other files
    # what a converted file says it was made of: 'file' and 'sha256'; None for other files
    origin: dict[str, str] | None
    # height and width that were asked for, or that the folder's config names, None without either
    img_size: tuple[int, int] | None
    # pooling that the folder's config, or the arguments of timm's `train.py`, name; None if none do
    global_pool: str | None

    @property
    def published(self) -> bool:
        """Whether this may be a published file, or one converted from it."""
        return self.layout == 'official' or '.' in self.name

    def report(self) -> dict[str, Any]:
        """What the file is, for JSON."""
        return dict(
            file=self.path.name, sha256=sha256_of(self.path), bytes=self.path.stat().st_size, layout=self.layout,
            wrapper=self.wrapper, others=self.others, origin=self.origin)


def open_checkpoint(
        path: Path,
        dtype: torch.dtype | None = None,
        ema: bool = False,
        img_size: tuple[int, int] | None = None,
        prefix: str | None = None,
) -> Checkpoint:
    """Open a weight file without running its pickled code; tensors are read when they are needed.

    Args:
        path: File, or folder that holds `model.safetensors`.
        dtype: Type of the weights, None for that of the file.
        ema: Take the averaged weights; the plain ones are taken otherwise, if there are both.
        img_size: Height and width in pixels that the position embedding is for, None for a square or what the folder
            says.
        prefix: Which of several networks to take, see `weights.checkpoint.unwrap`.

    Raises:
        ValueError: It cannot be read, is damaged, or holds no weights of a model of this package, no averaged ones,
            several networks, or values too large for `dtype`.
    """
    config: dict[str, Any] = {}
    if path.is_dir():
        if (path / CONFIG).is_file():
            config = json.loads((path / CONFIG).read_text(encoding='utf-8'))
        path = path / WEIGHTS
    contents = read_contents(path)
    check_published(path)
    tree, metadata = contents.tree, contents.metadata
    state_dict, wrapper = unwrap(tree, AVERAGED if ema else PLAIN + AVERAGED, prefix)
    if ema and not set(wrapper.split('.')) & set(AVERAGED):
        raise ValueError(f'{path} has no averaged weights ({" or ".join(AVERAGED)}): leave out --ema.')
    state_dict = _cast(state_dict, dtype)
    native = to_native(state_dict)
    found = [key for key in AVERAGED + PLAIN if isinstance(tree.get(key), dict)]
    others = [key for key in found if key != wrapper.partition('.')[0]]
    has_origin = {'source', 'source_sha256'} <= metadata.keys()
    origin = {'file': metadata['source'], 'sha256': metadata['source_sha256']} if has_origin else None
    input_size = config.get('pretrained_cfg', {}).get('input_size')
    return Checkpoint(
        path, layout_of(state_dict), wrapper, others, state_dict, native,
        name=metadata.get('model', ''),
        origin=origin,
        img_size=img_size or (tuple(input_size[-2:]) if input_size else None),
        global_pool=config.get('global_pool') or getattr(tree.get('args'), 'gp', None),
    )


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

"""A weight file of any layout, or a converted folder, opened to be converted: what it holds, what it says of itself."""
import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from ..weights.checkpoint import AVERAGED, PLAIN, to_native, unwrap
from ..weights.errors import readable_file_errors
from ..weights.integrity import sha256_of, why_no_weight_file
from ..weights.layout import layout_of

__all__ = ['CONFIG', 'WEIGHTS', 'Checkpoint', 'open_checkpoint']

WEIGHTS, CONFIG = 'model.safetensors', 'config.json'  # of timm's Hub folders


class Checkpoint(NamedTuple):
    """An open weight file.

    Attributes:
        path: The file.
        layout: 'official' or 'native'.
        wrapper: Dotted names of what the state dict was in, '' for nothing.
        others: Names of other state dicts in the file.
        state_dict: In the file's layout.
        name: Model that a converted file says it is of, '' for other files.
        origin: What a converted file says it was made of: 'file' and 'sha256'; None for other files.
        img_size: Height and width that the folder's config names, None for other files.
        global_pool: Pooling that the folder's config, or the arguments of timm's `train.py`, name; None if none do.
    """
    path: Path
    layout: str
    wrapper: str
    others: list[str]
    state_dict: dict[str, torch.Tensor]
    name: str
    origin: dict[str, str] | None
    img_size: tuple[int, int] | None
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


def open_checkpoint(path: Path, ema: bool = False) -> Checkpoint:
    """Open a weight file without running its pickled code; tensors are read when they are needed.

    Args:
        path: File, or folder that holds `model.safetensors`.
        ema: Take the averaged weights; the plain ones are taken otherwise, if there are both.

    Raises:
        RuntimeError: It cannot be read, or holds pickled objects besides tensors.
        ValueError: It holds no weights of a model of this package, or no averaged ones.
    """
    config: dict[str, Any] = {}
    if path.is_dir():
        if (path / CONFIG).is_file():
            config = json.loads((path / CONFIG).read_text(encoding='utf-8'))
        path = path / WEIGHTS
    with readable_file_errors(path):
        wrong = why_no_weight_file(path)
        if wrong:
            raise RuntimeError(f'{path} is {wrong} ({path.stat().st_size} bytes): fetch or write it again.')
        content, metadata = _load(path)
    state_dict, wrapper = unwrap(content, AVERAGED if ema else PLAIN + AVERAGED)
    if ema and not wrapper:
        raise ValueError(f'{path} has no averaged weights ({" or ".join(AVERAGED)}): leave out --ema.')
    layout = layout_of(state_dict)
    if not layout:
        to_native(state_dict)  # says what it is
    found = [key for key in AVERAGED + PLAIN if isinstance(content.get(key), dict)]
    others = [key for key in found if key != wrapper.partition('.')[0]]
    origin = {'file': metadata['source'], 'sha256': metadata['source_sha256']} if 'source_sha256' in metadata else None
    input_size = config.get('pretrained_cfg', {}).get('input_size')
    return Checkpoint(
        path, layout, wrapper, others, state_dict,
        name=metadata.get('model', ''),
        origin=origin,
        img_size=tuple(input_size[-2:]) if input_size else None,
        global_pool=config.get('global_pool') or getattr(content.get('args'), 'gp', None),
    )


def _load(path: Path) -> tuple[Any, dict[str, str]]:
    """What a file holds, and the texts in the header of a safetensors file."""
    with open(path, 'rb') as file:
        start = file.read(9)
    if start[8:] == b'{':
        with safe_open(path, framework='pt') as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    with torch.serialization.safe_globals([argparse.Namespace]):  # in most training checkpoints
        return torch.load(path, map_location='cpu', weights_only=True, mmap=start.startswith(b'PK')), {}

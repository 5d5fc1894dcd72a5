"""Checkpoints of a run: written whole or not at all, the last few kept, read without running pickled code."""
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import replaced

__all__ = ['Checkpoints', 'differences', 'load', 'random_state', 'set_random_state']

State = dict[str, Any]
NAME = re.compile(r'checkpoint-(\d+)\.pt')


class Checkpoints:
    """The checkpoints in a folder, named by the number of updates.

    Args:
        folder: Where they are.
        keep: How many of the last ones stay.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep

    def paths(self) -> list[Path]:
        """All that are there, the oldest first."""
        found = [(int(match.group(1)), path) for path in self.folder.glob('checkpoint-*.pt')
                 if (match := NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found)]

    def last(self) -> Path | None:
        """The last one, None if there is none."""
        paths = self.paths()
        return paths[-1] if paths else None

    def save(self, state: State, num_updates: int) -> Path:
        """Write a checkpoint, then remove the oldest ones that are too many.

        Raises:
            RuntimeError: It cannot be written; the earlier ones are still there.
        """
        path = self.folder / f'checkpoint-{num_updates:08d}.pt'
        try:
            with replaced(path) as part:
                torch.save(state, part)
        except (OSError, RuntimeError) as error:
            last = self.last()
            kept = f'the last one that was is {last.name}' if last else 'there is none yet'
            raise RuntimeError(
                f'{path} could not be written ({str(error).splitlines()[0]}); {kept}. Free space there, then go on '
                'with --resume auto.') from error
        for old in self.paths()[:-self.keep]:
            old.unlink()
        return path

    def sweep(self) -> None:
        """Remove what a killed process has left half written."""
        for folder in self.folder.glob('.checkpoint-*.pt.*'):
            shutil.rmtree(folder)


def load(path: Path) -> State:
    """Read a checkpoint.

    Raises:
        RuntimeError: It is none.
    """
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError as error:
        raise RuntimeError(f'{path} does not exist: name a checkpoint to --resume, or auto.') from error
    except Exception as error:  # of torch, pickle and zipfile, for whatever a file may hold
        raise RuntimeError(f'{path} is no checkpoint of a run: {str(error).splitlines()[0]}') from error


def differences(saved: State, current: State) -> list[str]:
    """Settings that differ, in words."""
    return [f'--{key.replace("_", "-")} was {saved.get(key)!r}, now {current.get(key)!r}'
            for key in sorted({*saved, *current}) if saved.get(key) != current.get(key)]


def random_state() -> State:
    """State of all random generators of this process, in types that are read without running code."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002  transforms use it
    state = {
        'python': [version, list(internal), gauss],
        'numpy': [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        'torch': torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: State) -> None:
    """The reverse of `random_state`."""
    version, internal, gauss = state['python']
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state['numpy']
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002  transforms use it
    torch.set_rng_state(state['torch'])
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])

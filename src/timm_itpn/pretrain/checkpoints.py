"""Checkpoints of a run: written whole or not at all, the last few kept, read without running pickled code."""
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..files import replaced

__all__ = ['Checkpoints', 'load', 'random_state', 'set_random_state']

State = dict[str, Any]


class Checkpoints(NamedTuple):
    """The checkpoints in a folder, named by the number of updates; the newest `keep` of them stay."""
    folder: Path
    keep: int

    def paths(self) -> list[Path]:
        """All that are there, the oldest first."""
        found = self.folder.glob('checkpoint-*.pt')
        return sorted(path for path in found if re.fullmatch(r'checkpoint-\d{8}\.pt', path.name))

    def last(self) -> Path | None:
        """The last one, None if there is none."""
        return next(reversed(self.paths()), None)

    def save(self, state: State, num_updates: int) -> None:
        """Write a checkpoint, then remove the oldest ones.

        Raises:
            RuntimeError: It cannot be written; the earlier ones are still there.
        """
        path = self.folder / f'checkpoint-{num_updates:08d}.pt'
        try:
            with replaced(path) as part:
                torch.save(state, part)
        except (OSError, RuntimeError) as error:
            last = self.last()
            kept = f'the last complete checkpoint is {last.name}' if last else 'there is no checkpoint yet'
            raise RuntimeError(
                f'{path} could not be written ({str(error).splitlines()[0]}); {kept}. Free space there, then go on '
                'with --resume auto.') from error
        for old in self.paths()[:-self.keep]:
            old.unlink()

    def sweep(self) -> None:
        """Remove checkpoints that a killed process left half-written."""
        for folder in self.folder.glob('.checkpoint-*.pt.*'):
            shutil.rmtree(folder)


def load(path: Path) -> State:
    """Read a checkpoint.

    Raises:
        RuntimeError: There is no such file, or it is not a checkpoint.
    """
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError as error:
        raise RuntimeError(f'{path} does not exist: name a checkpoint with --resume, or use --resume auto.') from error
    except Exception as error:  # of torch, pickle and zipfile, for whatever a file may hold
        raise RuntimeError(f'{path} is not a checkpoint of a run: {str(error).splitlines()[0]}') from error


def random_state() -> State:
    """State of the generators that a model draws from; samples do not depend on them."""
    state = {'torch': torch.get_rng_state()}
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: State) -> None:
    """The reverse of `random_state`."""
    torch.set_rng_state(state['torch'])
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])

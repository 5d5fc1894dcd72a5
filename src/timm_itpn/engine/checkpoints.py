"""Checkpoints of a run: written whole or not at all, the last few kept, read without running pickled code."""
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import torch

from ..checks import check_folder
from ..files import replaced
from ..weights.read import UnreadableError, read_contents

LOCK_TIMEOUT_S = 10  # readers of a process that was killed end within 5 s, and hold its lock until then
REMEDY = 'Lower --lr, or use --amp-dtype bfloat16, and go on with --resume auto, or from an earlier checkpoint.'
State = dict[str, Any]


class Checkpoints(NamedTuple):
    """The checkpoints in a folder, named by the number of updates; the newest `keep` of them stay."""
    folder: Path
    keep: int

    def paths(self) -> list[Path]:
        """All that are there, the oldest first."""
        return sorted(self.folder.glob(f'checkpoint-{8 * "[0-9]"}.pt'))

    def to_resume(self, resume: str | None) -> list[Path]:
        """Those that a run may go on from, the best first; none to start.

        Args:
            resume: 'auto', a file, or None to start.

        Raises:
            ValueError: The folder holds a run that would be overwritten, or cannot be one.
        """
        check_folder(self.folder, '--output')
        paths = self.paths()[::-1]
        named = [] if resume in (None, 'auto') else [Path(str(resume))]
        if paths and (resume is None or named and named[0].resolve().parent != self.folder.resolve()):
            raise ValueError(f'{self.folder} holds a run: go on with --resume auto, or name another folder with '
                             '--output.')
        if not paths and any(self.folder.glob('*.safetensors')):
            raise ValueError(f'{self.folder} holds the weights of a run: name another folder with --output.')
        return named or paths

    def newest(self, resume: str | None) -> tuple[Path, State] | None:
        """The checkpoint that a run goes on from, with its contents: the newest that is whole; None to start.

        Raises:
            RuntimeError: None is whole.
        """
        paths = self.to_resume(resume)
        for path in paths:
            try:
                return path, load(path)
            except (OSError, RuntimeError, ValueError) as error:
                if path == paths[-1]:
                    raise
                print(f'going on from the one before, because {str(error).removesuffix(".")}', file=sys.stderr)
        return None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and keep other runs out of it; what a killed process left half-written is removed.

        Raises:
            RuntimeError: Another run is at work in it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(self.folder / '.lock', LOCK_TIMEOUT_S):
                for part in self.folder.glob('.*.????????'):  # of `replaced`
                    if part.is_dir() and {path.name for path in part.iterdir()} <= {part.name[1:-9], 'plain'}:
                        shutil.rmtree(part)
                yield
        except filelock.Timeout as error:
            raise RuntimeError(f'Another run is at work in {self.folder}: wait for its end, or name another folder '
                               'with --output.') from error

    def save(self, state: State, num_updates: int) -> None:
        """Write a checkpoint, then remove the oldest ones.

        Raises:
            OSError: It cannot be written; the earlier ones are still there.
            RuntimeError: A weight is not finite; the same.
        """
        if bad := not_finite(state):
            raise RuntimeError(f'{bad} is not finite after update {num_updates}, which is not saved. {REMEDY}')
        save(state, self.folder / f'checkpoint-{num_updates:08d}.pt')
        self.prune(self.keep)

    def prune(self, keep: int) -> None:
        """Remove all but the newest checkpoints."""
        for old in self.paths()[:-keep]:
            old.unlink()

    def set_aside(self, resumed: Path) -> None:
        """Rename the checkpoints after the one that the run goes on from, so that no other run does."""
        for path in self.paths():
            if path.name > resumed.name:
                os.replace(path, f'{path}.unused')
                print(f'{path} is not used any more: it is {path.name}.unused now', file=sys.stderr)


def save(tree: Any, path: Path) -> None:
    """`torch.save`, whole or not at all."""
    with replaced(path) as part, part.open('wb') as file:  # into an open file: else torch hides why it cannot write
        torch.save(tree, file)


def load(path: Path, option: str = '--resume') -> State:
    """Read a checkpoint whose checksums are right; `option` names it.

    Raises:
        RuntimeError: There is no such file, it is damaged, or not a checkpoint.
    """
    state, reason = {}, ''
    try:
        state = read_contents(path).tree
    except UnreadableError as error:
        reason = error.reason
    except FileNotFoundError as error:
        raise RuntimeError(f'{path} does not exist: name a checkpoint with {option}.') from error
    if not reason and (not isinstance(state, dict) or 'processes' not in state):
        reason = 'not a checkpoint of a run'
    if reason or (bad := not_finite(state)):
        raise RuntimeError(f'{path} is {reason or f"damaged ({bad} is not finite)"}: name another with {option}.')
    for _, tensor in _tensors(state):
        tensor.data = tensor.clone()  # it was mapped from the file, which may be removed
    return state


def not_finite(tree: Any) -> str:
    """Name of a tensor with a NaN or an infinity in dicts and lists, '' if there is none."""
    return next((name for name, tensor in _tensors(tree) if not tensor.isfinite().all()), '')


def _tensors(tree: Any, name: str = '') -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in dicts and lists, with their place."""
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, (dict, list, tuple)):
        for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _tensors(child, f'{name}.{key}' if name else str(key))

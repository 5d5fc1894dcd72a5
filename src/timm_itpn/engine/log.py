"""Log of a run: a progress bar, lines of JSON, timm's table of epochs, and TensorBoard if asked for."""
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from timm.utils import update_summary
from tqdm import tqdm

from ..files import replaced
from .run import Run

__all__ = ['Log']

LINES = 'log.jsonl'
TABLE = 'summary.csv'


class Log:
    """What a run tells of itself; only its first process does.

    Lines after the updates that are done, of a run that was interrupted, are removed.
    """

    def __init__(self, run: Run):
        self.run = run
        self.folder = run.args.output
        self.writes = run.args.rank == 0
        self.writer: Any | None = None
        self.progress = tqdm(
            total=run.total_updates - run.ahead, initial=run.num_updates, unit='update', mininterval=1, file=sys.stderr,
            disable=not self.writes)
        if not self.writes:
            return
        _trim(self.folder / LINES, lambda line: json.loads(line)['num_updates'] <= run.num_updates)
        _trim(self.folder / TABLE, lambda row: run.epoch > 0 and (row[0] == 'e' or int(row.split(',')[0]) < run.epoch))
        if run.args.log_tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(str(self.folder / 'tensorboard'), purge_step=run.num_updates + 1)

    def update(self, **shown: Any) -> None:
        """One more update is done."""
        self.progress.update()
        self.progress.set_postfix(**shown, refresh=False)

    def line(self, values: dict[str, float]) -> None:
        """A line of the log, after an update."""
        if not self.writes:
            return
        with (self.folder / LINES).open('a', encoding='utf-8') as file:
            file.write(json.dumps({'num_updates': self.run.num_updates, **values}) + '\n')
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, self.run.num_updates)

    def epoch(self, values: dict[str, float], metrics: Mapping[str, float | None]) -> None:
        """A row of the table, at the end of an epoch."""
        if self.run.unreadable:
            tqdm.write(f'epoch {self.run.epoch}: {len(self.run.unreadable)} images were skipped because they cannot be '
                       f'read, {self.run.first_unreadable()}', file=sys.stderr)
        if self.writes:
            update_summary(self.run.epoch, values, metrics, str(self.folder / TABLE), lr=self.run.lr)

    def close(self) -> None:
        self.progress.close()
        if self.writer is not None:
            self.writer.close()


def _trim(path: Path, keep: Callable[[str], bool]) -> None:
    """Remove the lines that are not to be kept, and those that were cut off."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding='utf-8', errors='replace').splitlines(keepends=True):
        try:
            if text.endswith('\n') and keep(text):
                kept.append(text)
        except (LookupError, TypeError, ValueError):  # a machine that stopped leaves anything at the end of a file
            pass
    with replaced(path) as part:
        part.write_text(''.join(kept), encoding='utf-8')

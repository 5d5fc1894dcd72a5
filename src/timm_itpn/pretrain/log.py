"""Log of a run: a progress bar, lines of JSON, timm's table of epochs, and TensorBoard if asked for."""
import json
import sys
from pathlib import Path
from typing import Any

from timm.utils import trim_summary, update_summary
from tqdm import tqdm

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
            total=run.total_updates, initial=run.num_updates, unit='update', mininterval=1, file=sys.stderr,
            disable=not self.writes)
        if not self.writes:
            return
        _trim_lines(self.folder / LINES, run.num_updates)
        trim_summary(str(self.folder / TABLE), run.epoch)
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

    def epoch(self, values: dict[str, float]) -> None:
        """A row of the table, at the end of an epoch."""
        if self.writes:
            update_summary(self.run.epoch, values, None, str(self.folder / TABLE), lr=self.run.lr)

    def close(self) -> None:
        self.progress.close()
        if self.writer is not None:
            self.writer.close()


def _trim_lines(path: Path, num_updates: int) -> None:
    """Remove the lines after `num_updates`, and one that was cut off."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding='utf-8').splitlines(keepends=True):
        if text.endswith('\n') and json.loads(text)['num_updates'] <= num_updates:
            kept.append(text)
    path.write_text(''.join(kept), encoding='utf-8')

"""Log of a run: a progress bar, lines of JSON, timm's table of epochs, and TensorBoard if asked for."""
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from timm.utils import trim_summary, update_summary
from tqdm import tqdm

__all__ = ['Log', 'check_tensorboard']

LINES = 'log.jsonl'
TABLE = 'summary.csv'


class Log:
    """What one process of a run tells; others than the first tell nothing.

    Args:
        folder: Where the files are.
        total: Updates of the whole run.
        done: Updates that are done already; later lines, of a run that was interrupted, are removed.
        epoch: Epochs that are done already.
        writes: This is the first process.
        tensorboard: Also write for TensorBoard; see `check_tensorboard`.
    """

    def __init__(self, folder: Path, total: int, done: int, epoch: int, writes: bool, tensorboard: bool = False):
        self.folder = folder
        self.writes = writes
        self.writer: Any | None = None
        self.progress = tqdm(
            total=total, initial=done, unit='update', mininterval=1, file=sys.stderr, disable=not writes)
        if not writes:
            return
        trim_lines(folder / LINES, done)
        trim_summary(str(folder / TABLE), epoch)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(str(folder / 'tensorboard'), purge_step=done + 1)

    def update(self, images_per_s: float, **shown: Any) -> None:
        """One more update is done."""
        self.progress.update()
        self.progress.set_postfix(images_per_s=f'{images_per_s:.1f}', **shown, refresh=False)

    def line(self, num_updates: int, values: dict[str, float]) -> None:
        """A line of the log."""
        if not self.writes:
            return
        with (self.folder / LINES).open('a', encoding='utf-8') as file:
            file.write(json.dumps({'num_updates': num_updates, **values}) + '\n')
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, num_updates)

    def epoch(self, epoch: int, values: dict[str, float], lr: float) -> None:
        """A row of the table."""
        if self.writes:
            update_summary(epoch, values, None, str(self.folder / TABLE), lr=lr)

    def close(self) -> None:
        self.progress.close()
        if self.writer is not None:
            self.writer.close()


def check_tensorboard() -> None:
    """Raise RuntimeError if TensorBoard is not installed."""
    if importlib.util.find_spec('tensorboard') is None:
        raise RuntimeError("--log-tensorboard needs tensorboard: pip install 'timm-itpn[tensorboard]'")


def trim_lines(path: Path, num_updates: int) -> None:
    """Remove the lines after `num_updates`, and one that was cut off."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding='utf-8').splitlines(keepends=True):
        if text.endswith('\n') and json.loads(text)['num_updates'] <= num_updates:
            kept.append(text)
    path.write_text(''.join(kept), encoding='utf-8')

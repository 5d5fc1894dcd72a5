"""Rows of the studies, those that come with the package, and their tables."""
import importlib
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..bench.machine import Machine
from ..bench.rows import read, table

__all__ = ['SCORES', 'Row', 'load', 'markdown', 'measured', 'report']

SCORES = {  # all but times are in percent
    'top1': 'top-1',  # canvases whose digit is right
    'miou': 'mIoU',  # intersection over union of tokens, mean over their classes
    'box_AP': 'box AP',
    'box_AP50': 'box AP50',
    'mask_AP': 'mask AP',
    'ms': 'ms',  # of a processor, per image
}
_SETTLED = 'Settled, and no longer in the study; the code that made these rows is at commit 418d90c:'


@dataclass(frozen=True)
class Row:
    """One measurement of a network."""
    arm: str  # what is compared: a setting, or a start
    measured: str  # when, or after how many labels
    seed: int  # of weights and order
    scores: dict[str, float]  # by the names in `SCORES`
    machine: Machine

    @classmethod
    def of_json(cls, arm: str, measured: str, seed: int, machine: dict[str, Any], **scores: float) -> 'Row':
        return cls(arm, measured, seed, scores, Machine(**machine))

    def json_line(self) -> str:
        values = asdict(self)
        return json.dumps({**values.pop('scores'), **values}) + '\n'

    def __str__(self) -> str:
        scores = ', '.join(f'{SCORES[name]} {score:.2f}' for name, score in self.scores.items())
        return f'{self.arm}, {self.measured}, seed {self.seed}: {scores}'


def load(name: str) -> ModuleType:
    """The module of a study: `ARMS`, of which the first is what the others are compared with, and `study`."""
    return importlib.import_module(f'{__package__}.{name}')


def report(row: Row) -> Row:
    """The row, which is also printed to stderr."""
    print(row, file=sys.stderr, flush=True)
    return row


def measured(name: str) -> list[Row]:
    """The rows of a study that come with the package, none if it has not been run."""
    path = Path(__file__).with_name(f'{name}.jsonl')
    return read(path, Row.of_json) if path.exists() else []


def markdown(name: str, rows: Sequence[Row]) -> str:
    """The tables of a study: means over seeds, in brackets the difference from the first arm with the same seeds."""
    arms = load(name).ARMS
    reference = [row for row in rows if row.arm == arms[0]]
    text = f'{rows[0].machine}:\n\n{_table([row for row in rows if row.arm in arms], reference)}'
    settled = [row for row in rows if row.arm not in arms]
    return f'{text}\n\n{_SETTLED}\n\n{_table(settled, reference)}' if settled else text


def _table(rows: Sequence[Row], reference: Sequence[Row]) -> str:
    columns = list(itertools.product(dict.fromkeys(row.measured for row in rows), rows[0].scores))
    lines = []
    for arm in dict.fromkeys(row.arm for row in rows):
        cells = []
        for kind, score in columns:
            values = {row.seed: row.scores[score] for row in rows if (row.arm, row.measured) == (arm, kind)}
            others = [row.scores[score] for row in reference if row.measured == kind and row.seed in values]
            mean = statistics.fmean(values.values()) if values else None
            versus = f' ({mean - statistics.fmean(others):+.2f})' if mean and others and arm != reference[0].arm else ''
            cells.append('' if mean is None else f'{mean:.2f}{versus}')
        lines.append([arm, *cells, str(len({row.seed for row in rows if row.arm == arm}))])
    return table(['arm', *(f'{SCORES[score]}, {kind}' for kind, score in columns), 'seeds'], lines)

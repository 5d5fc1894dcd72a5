"""Rows of the studies, those that come with the package, and their tables."""
import importlib
import itertools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..bench.machine import Machine
from ..bench.rows import read, table

__all__ = ['Row', 'load', 'markdown', 'measured', 'report']

_SETTLED = 'Settled, and no longer in the study; the code that made these rows is at commit 418d90c:'


@dataclass(frozen=True)
class Row:
    """One measurement of a network."""
    arm: str  # what is compared: a setting, or a start
    measured: str  # when, or after how many labels
    seed: int  # of weights and order
    top1: float  # canvases whose digit is right, in percent
    miou: float  # intersection over union of tokens, mean over their classes, in percent
    machine: Machine

    @classmethod
    def of_json(cls, machine: dict[str, Any], **values: Any) -> 'Row':
        return cls(machine=Machine(**machine), **values)

    def __str__(self) -> str:
        return f'{self.arm}, {self.measured}, seed {self.seed}: top-1 {self.top1:.2f}, mIoU {self.miou:.2f}'


def load(name: str) -> ModuleType:
    """The module of a study: `ARMS`, of which the first is what the others are compared with, and `study`."""
    return importlib.import_module(f'{__package__}.{name}')


def report(row: Row) -> Row:
    """The row, which is also printed to stderr."""
    print(row, file=sys.stderr, flush=True)
    return row


def measured(name: str) -> list[Row]:
    """The rows of a study that come with the package."""
    return read(Path(__file__).with_name(f'{name}.jsonl'), Row.of_json)


def markdown(name: str, rows: Sequence[Row]) -> str:
    """The tables of a study: means over seeds, in brackets the difference from the first arm with the same seeds."""
    arms = load(name).ARMS
    reference = [row for row in rows if row.arm == arms[0]]
    text = f'{rows[0].machine}:\n\n{_table([row for row in rows if row.arm in arms], reference)}'
    settled = [row for row in rows if row.arm not in arms]
    return f'{text}\n\n{_SETTLED}\n\n{_table(settled, reference)}' if settled else text


def _table(rows: Sequence[Row], reference: Sequence[Row]) -> str:
    columns = list(itertools.product(dict.fromkeys(row.measured for row in rows), ('top1', 'miou')))
    lines = []
    for arm in dict.fromkeys(row.arm for row in rows):
        cells = []
        for kind, score in columns:
            values = {row.seed: getattr(row, score) for row in rows if (row.arm, row.measured) == (arm, kind)}
            others = [getattr(row, score) for row in reference if row.measured == kind and row.seed in values]
            mean = statistics.fmean(values.values()) if values else None
            versus = f' ({mean - statistics.fmean(others):+.2f})' if mean and others and arm != reference[0].arm else ''
            cells.append('' if mean is None else f'{mean:.2f}{versus}')
        lines.append([arm, *cells, str(len({row.seed for row in rows if row.arm == arm}))])
    names = {'top1': 'top-1', 'miou': 'mIoU'}
    return table(['arm', *(f'{names[score]}, {kind}' for kind, score in columns), 'seeds'], lines)

"""Rows of the studies, those that come with the package, and their tables."""
import importlib
import os
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..bench.machine import Machine, this_machine
from ..bench.rows import read, table

__all__ = ['Key', 'Row', 'load', 'markdown', 'measure', 'measure_seeds', 'measured']

Key = tuple[str, str, int]  # arm, measured and seed of a row

_SETTLED = 'Settled, and no longer in the study; the code that made these rows is at commit 418d90c:'


@dataclass(frozen=True)
class Row:
    """One measurement of a network."""
    arm: str  # what is compared: a setting, or a start
    measured: str  # when, or after how many labels
    seed: int  # of weights and order
    scores: dict[str, float]  # by name, in percent
    machine: Machine

    @property
    def key(self) -> Key:
        return self.arm, self.measured, self.seed

    @classmethod
    def of_json(cls, machine: dict[str, Any], **values: Any) -> 'Row':
        return cls(machine=Machine(**machine), **values)

    def __str__(self) -> str:
        scores = ', '.join(f'{name} {value:.2f}' for name, value in self.scores.items())
        return f'{self.arm}, {self.measured}, seed {self.seed}: {scores}'


def load(name: str) -> ModuleType:
    """The module of a study: `ARMS`, of which the first is what the others are compared with, and `study`."""
    return importlib.import_module(f'{__package__}.{name}')


def measure(
        arms: Iterable[str], seed: int, done: Collection[Key], start: Callable[[], Any],
        make: Callable[[str, Any], Any], tune: Callable[[Any], None], test: Callable[[Any], dict[str, float]],
) -> Iterator[Row]:
    """Rows of networks that `make` makes of arms and of one start, as they are and tuned; what is done is left out."""
    keys = [key for kind in ('as it is', 'tuned') for arm in arms if (key := (arm, kind, seed)) not in done]
    state = start() if keys else None
    for key in keys:
        network = make(key[0], state)
        if key[1] == 'tuned':
            tune(network)
        yield Row(*key, test(network), this_machine('cpu'))


def measure_seeds(
        rows_of: Callable[[int], list[Row]], seeds: Iterable[int], done: Collection[Key]) -> Iterator[Row]:
    """Rows of the seeds that have none yet; as many seeds at a time as there are cores, a thread each."""
    measured_already = {seed for _, _, seed in done}
    left = [seed for seed in seeds if seed not in measured_already]
    processes = max(1, min(len(left), os.cpu_count() or 1))
    with ProcessPoolExecutor(processes, get_context('spawn'), torch.set_num_threads, (1,)) as pool:
        for rows in pool.map(rows_of, left):
            yield from rows


def measured(name: str) -> list[Row]:
    """The rows of a study that come with the package, if there are any."""
    path = Path(__file__).with_name(f'{name}.jsonl')
    return read(path, Row.of_json) if path.exists() else []


def markdown(name: str, rows: Sequence[Row]) -> str:
    """The tables of a study: means over seeds, in brackets the difference from the first arm with the same seeds."""
    arms = load(name).ARMS
    rows = sorted(rows, key=lambda row: arms.index(row.arm) if row.arm in arms else len(arms))
    reference = [row for row in rows if row.arm == arms[0]]
    text = f'{rows[0].machine}:\n\n{_table([row for row in rows if row.arm in arms], reference)}'
    settled = [row for row in rows if row.arm not in arms]
    return f'{text}\n\n{_SETTLED}\n\n{_table(settled, reference)}' if settled else text


def _table(rows: Sequence[Row], reference: Sequence[Row]) -> str:
    columns = list(dict.fromkeys((row.measured, score) for row in rows for score in row.scores))
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
    return table(['arm', *(f'{score}, {kind}' for kind, score in columns), 'seeds'], lines)

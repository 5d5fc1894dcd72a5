"""Rows of the studies, those that come with the package, and their tables."""
import importlib
import os
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..bench.machine import Machine, this_machine
from ..bench.rows import read, table

__all__ = ['Row', 'load', 'markdown', 'measure', 'measure_seeds', 'measured']


@dataclass(frozen=True)
class Row:
    """One measurement of a network."""
    arm: str  # what is compared: a setting, or a start
    measured: str  # when, or after how many labels
    seed: int  # of weights and order
    scores: dict[str, float]  # by name, in percent
    machine: Machine

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
        arms: Iterable[str], seed: int, device: str, make: Callable[[str], Any], tune: Callable[[Any], None],
        test: Callable[[Any], dict[str, float]],
) -> list[Row]:
    """Rows of the networks of all arms, as they are and tuned."""
    rows = []
    for arm in arms:
        network = make(arm)
        rows.append(Row(arm, 'as it is', seed, test(network), this_machine(device)))
        tune(network)
        rows.append(Row(arm, 'tuned', seed, test(network), this_machine(device)))
    return rows


def measure_seeds(
        rows_of: Callable[[int, str], list[Row]], seeds: Iterable[int], done: Collection[int], device: str,
) -> Iterator[Row]:
    """Rows of the seeds that are not done; as many seeds at a time as there are cores, a thread each.

    Args:
        rows_of: Measures one seed on a device; a function that another process can import.
        seeds: Of weights and order.
        done: Seeds that are not wanted.
        device: 'cpu' or 'cuda'.

    Yields:
        The rows of a seed when all of it is measured.
    """
    left = [seed for seed in seeds if seed not in done]
    processes = max(1, min(len(left), os.cpu_count() or 1))
    with ProcessPoolExecutor(processes, get_context('spawn'), torch.set_num_threads, (1,)) as pool:
        for rows in pool.map(rows_of, left, repeat(device)):
            yield from rows


def measured(name: str) -> list[Row]:
    """The rows of a study that come with the package, if there are any."""
    path = Path(__file__).with_name(f'{name}.jsonl')
    return read(path, Row.of_json) if path.exists() else []


def markdown(name: str, rows: Sequence[Row]) -> str:
    """The tables of a study: means over seeds, in brackets the difference from the first arm with the same seeds."""
    first, *_ = arms = load(name).ARMS
    columns = list(dict.fromkeys((row.measured, score) for row in rows for score in row.scores))
    lines = []
    for arm in arms:
        cells = []
        for kind, score in columns:
            values, others = (
                {row.seed: row.scores[score] for row in rows if (row.arm, row.measured) == (this, kind)}
                for this in (arm, first))
            shared = [values[seed] - others[seed] for seed in values.keys() & others.keys()]
            versus = f' ({statistics.fmean(shared):+.2f})' if shared and arm != first else ''
            cells.append(f'{statistics.fmean(values.values()):.2f}{versus}' if values else '')
        if any(cells):
            lines.append([arm, *cells, str(len({row.seed for row in rows if row.arm == arm}))])
    header = ['arm', *(f'{score}, {kind}' for kind, score in columns), 'seeds']
    return f'{rows[0].machine}:\n\n{table(header, lines)}'

"""Rows of the studies, those that come with the package, their tables, and a chart of what acceleration costs."""
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
from typing import TYPE_CHECKING, Any

import torch

from ..bench import rows as speed
from ..bench.cases import Case
from ..bench.rows import Machine, read, table, this_machine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Measurement = tuple[str, str, dict[str, float]]  # `arm`, `measured` and `scores` of a row

_TIMED = Case('fast_itpn_base', (1024, 1024), batch=1, pyramid=True)
_SCORES = (  # score and its marker; study, its arm without acceleration, how those with it begin, when it is measured
    ('mIoU', 'o', 'acceleration', 'off', '', 'tuned'),
    ('top-1', 's', 'acceleration', 'off', '', 'tuned'),
    ('box AP', '^', 'detection', 'pixel', 'pixel, ', 'tuned to them'))
_ALLOWED = -0.5  # points


@dataclass(frozen=True)
class Row:
    """One measurement of a network."""
    arm: str  # what is compared: a setting, or a start
    measured: str  # when, or after how many labels
    seed: int  # of weights and order
    scores: dict[str, float]  # by name, in percent
    machine: Machine

    def __str__(self) -> str:
        scores = ', '.join(f'{name} {value:.2f}' for name, value in self.scores.items())
        return f'{self.arm}, {self.measured}, seed {self.seed}: {scores}'


def load(name: str) -> ModuleType:
    """The module of a study.

    It has `ARMS`, of which the first is what the others are compared with, and `study_seed(seed, device)`, which
    yields what is measured with one seed, a `Measurement` each.
    """
    return importlib.import_module(f'{__package__}.{name}')


def run(name: str, seeds: Iterable[int], done: Collection[int], device: str) -> Iterator[Row]:
    """Measure the seeds that are not done; as many at a time as there are cores, a thread each.

    Args:
        name: Of the study.
        seeds: Of weights, order and masks; the data are the same for all.
        done: Seeds that are not wanted.
        device: 'cpu' or 'cuda'.

    Yields:
        The rows of a seed when all of it is measured.
    """
    left = [seed for seed in dict.fromkeys(seeds) if seed not in done]
    with ProcessPoolExecutor(os.cpu_count(), get_context('spawn'), torch.set_num_threads, (1,)) as pool:
        for rows in pool.map(_rows_of_seed, repeat(name), left, repeat(device)):
            yield from rows


def _rows_of_seed(name: str, seed: int, device: str) -> list[Row]:
    machine = this_machine(device)
    return [Row(arm, measured, seed, scores, machine) for arm, measured, scores in load(name).study_seed(seed, device)]


def as_it_is_and_tuned(
        arms: Iterable[str], make: Callable[[str], Any], tune: Callable[[Any], object],
        test: Callable[[Any], dict[str, float]],
) -> Iterator[Measurement]:
    """Measure the network that `make` makes of each arm, before and after fine-tuning."""
    for arm in arms:
        network = make(arm)
        yield arm, 'as it is', test(network)
        tune(network)
        yield arm, 'tuned', test(network)


def measured(name: str) -> list[Row]:
    """The rows of a study that come with the package, if there are any."""
    return read(Path(__file__).with_name(f'{name}.jsonl'), Row)


def markdown(name: str, rows: Sequence[Row]) -> str:
    """The tables of a study: means over seeds, in brackets the difference from the first arm with the same seeds."""
    first, *_ = arms = load(name).ARMS
    columns = list(dict.fromkeys((row.measured, score) for row in rows for score in row.scores))
    lines = []
    for arm in arms:
        cells = []
        for column in columns:
            values = _by_seed(rows, arm, *column)
            versus = None if arm == first else _difference(rows, arm, first, *column)
            cell = f'{statistics.fmean(values.values()):.2f}' if values else ''
            cells.append(cell if versus is None else f'{cell} ({versus:+.2f})')
        if any(cells):
            lines.append([arm, *cells, str(len({row.seed for row in rows if row.arm == arm}))])
    header = ['arm', *(f'{score}, {kind}' for kind, score in columns), 'seeds']
    return f'{rows[0].machine}:\n\n{table(header, lines)}'


def draw() -> 'Figure':
    """Speed, and mean difference from `off` after fine-tuning, of the rows that come with the package.

    The speed is that on the CPU that was measured first, the same for carried and stored tokens.
    """
    from matplotlib.figure import Figure

    timed = [row for row in speed.measured() if row.case == _TIMED and row.machine.gpu is None]
    machine = timed[0].machine
    ratios: dict[str, Any] = {row.candidate: row.speedup_over_ours for row in timed if row.machine == machine}
    speeds = [ratios[name] for name in ('ours', 'ours light', 'ours full')]
    figure = Figure(figsize=(6., 3.5), layout='constrained')
    axes = figure.subplots()
    axes.axhline(_ALLOWED, color='grey', linestyle=':')
    for score, marker, study, off, prefix, when in _SCORES:
        rows = measured(study)
        for tokens, suffix, colour in (('carried', '', 'tab:blue'), ('stored', ', stored', 'tab:orange')):
            points: list[Any] = [
                _difference(rows, f'{prefix}{setting}{suffix}', off, when, score) for setting in ('light', 'full')]
            axes.plot(speeds, [0., *points], marker=marker, color=colour, linewidth=0.5, label=f'{score}, {tokens}')
    axes.set_xticks(speeds, [f'off\n{speeds[0]:.2f}x', f'light\n{speeds[1]:.2f}x', f'full\n{speeds[2]:.2f}x'])
    axes.set_xlabel(f'times as fast as off: {_TIMED}, {machine.cpu}', fontsize=8)
    axes.set_ylabel('difference from off, points', fontsize=8)
    axes.legend(fontsize=8)
    return figure


def _difference(rows: Iterable[Row], arm: str, first: str, measured: str, score: str) -> float | None:
    """Mean difference between the scores of two arms with the same seeds, None without such."""
    values, others = (_by_seed(rows, each, measured, score) for each in (arm, first))
    shared = [values[seed] - others[seed] for seed in values.keys() & others.keys()]
    return statistics.fmean(shared) if shared else None


def _by_seed(rows: Iterable[Row], arm: str, measured: str, score: str) -> dict[int, float]:
    return {row.seed: row.scores[score] for row in rows if (row.arm, row.measured) == (arm, measured)}

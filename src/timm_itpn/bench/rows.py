"""Rows of measurements: as tables, as a chart, and as files of JSON lines. Only to tell the machine needs torch."""
import datetime
import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, TypeVar

from .. import __version__
from ..checks import read_text
from ..files import replaced
from .cases import Case

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar('T')

SPEEDUPS = 'vs ours, vs baseline: the time of that one divided by the time of this one; above 1x, this one is faster'
_WIDTH = 6.  # inches
_BAR_HEIGHT = 0.3  # inches
_TITLE_WIDTH = 85  # characters


@dataclass(frozen=True)
class Machine:
    """Machine, versions and date of a row; `gpu` is None where the CPU computes."""
    cpu: str
    gpu: str | None
    cores: int
    threads: int
    python: str
    torch: str
    timm: str
    timm_itpn: str
    date: str

    def __str__(self) -> str:
        where = self.gpu or f'{self.cpu}, threads: {self.threads}, cores: {self.cores}'
        versions = f'Python {self.python}, torch {self.torch}, timm {self.timm}, timm-itpn {self.timm_itpn}'
        return f'{where}; {versions}; {self.date}'


@dataclass(frozen=True)
class Row:
    """What was measured of one candidate."""
    case: Case
    candidate: str  # 'ours', 'ours fused', 'baseline', the name of a model, ...
    same_function: bool  # its outputs have to agree with ours
    gflop_per_image: float  # a multiply-add is two operations
    kernels: list[str]  # of attention, that ran
    output_error: float | None  # relative to our outputs; None where they are of another kind
    peak_memory_mib: float | None  # allocated during a call, without the weights; None if it cannot be told
    ms: float  # median time of a call
    p95_ms: float  # its 95th percentile
    relative_iqr: float  # its interquartile range, relative to the median
    speedup_over_ours: float | None  # median ratio of the times of a round; None if outputs should agree and do not
    speedup_over_baseline: float | None  # likewise; None without a baseline
    ceiling_tflop_per_s: float  # of plain matrix products in the shapes of our model
    mm_tflop_per_s: float  # the same by `torch.mm` alone
    repeats: int  # rounds that count
    warmup: int  # rounds before them
    machine: Machine

    @property
    def ms_per_image(self) -> float:
        return self.ms / self.case.batch

    @property
    def tflop_per_s(self) -> float:
        return self.gflop_per_image / self.ms_per_image


def this_machine(device: str) -> Machine:
    """The machine that this process runs on, and its versions.

    Args:
        device: 'cpu' or 'cuda'.
    """
    import timm
    import torch

    info = Path('/proc/cpuinfo')
    lines = info.read_text(encoding='utf-8', errors='replace').splitlines() if info.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    name = names[0] if names else platform.processor() or platform.machine()
    return Machine(
        cpu=f'{name} ({torch.backends.cpu.get_cpu_capability()})',  # the name alone may stand for several kinds
        gpu=torch.cuda.get_device_name() if device == 'cuda' else None,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        timm=timm.__version__,
        timm_itpn=__version__,
        date=datetime.date.today().isoformat(),
    )


def markdown(rows: Iterable[Row]) -> str:
    """Rows in Markdown: a table for each case, the machine above the cases that were measured on it."""
    lines = [SPEEDUPS]
    for machine, of_machine in groupby(sorted(rows, key=lambda row: str(row.machine)), key=lambda row: row.machine):
        lines.append(f'## {machine}')
        lines += [markdown_of_case(list(group)) for _, group in groupby(of_machine, key=lambda row: row.case)]
    return '\n\n'.join(lines)


def markdown_of_case(rows: Sequence[Row]) -> str:
    """The rows of one case as a table, below the case and the ceiling."""
    ceiling, mm = rows[0].ceiling_tflop_per_s, rows[0].mm_tflop_per_s
    title = f'{rows[0].case}; ceiling {number(ceiling)} TFLOP/s (`torch.mm` alone {number(mm)})'
    return f'{title}:\n\n{table(list(_COLUMNS), ([cell(row) for cell in _COLUMNS.values()] for row in rows))}'


def _ms_per_image(row: Row) -> str:
    p95 = f' (p95 {number(row.p95_ms / row.case.batch)})' if row.case.mode == 'latency' else ''
    return f'{number(row.ms_per_image)}{p95}'


_COLUMNS: dict[str, Callable[[Row], str]] = {
    'candidate': lambda row: row.candidate,
    'ms/image': _ms_per_image,
    'images/s': lambda row: number(1000 / row.ms_per_image),
    'vs ours': lambda row: 'outputs differ' if row.speedup_over_ours is None else f'{row.speedup_over_ours:.2f}x',
    'vs baseline': lambda row: '' if row.speedup_over_baseline is None else f'{row.speedup_over_baseline:.2f}x',
    'TFLOP/s': lambda row: number(row.tflop_per_s),
    'of ceiling': lambda row: f'{row.tflop_per_s / row.ceiling_tflop_per_s:.0%}',
    'peak MiB': lambda row: '' if row.peak_memory_mib is None else f'{row.peak_memory_mib:.1f}',
    'IQR': lambda row: f'{row.relative_iqr:.1%}',
    'kernels': lambda row: ', '.join(row.kernels),
}


def number(value: float) -> str:
    """A number with four digits, or with those before the point."""
    return f'{value:.0f}' if value >= 1000 else f'{value:.4g}'


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table that is readable as text too: the first column to the left, the others to the right."""
    texts = [list(header), *map(list, lines)]
    widths = [max(map(len, column)) for column in zip(*texts)]
    texts.insert(1, [':' + '-' * (widths[0] - 1), *('-' * (width - 1) + ':' for width in widths[1:])])
    return '\n'.join(
        f'| {line[0]:<{widths[0]}} | {" | ".join(map(str.rjust, line[1:], widths[1:]))} |' for line in texts)


def draw(rows: Sequence[Row]) -> 'Figure':
    """Bars of milliseconds per image. The line is what our model would take at the rate of the ceiling.

    Args:
        rows: Rows of one case next to each other.
    """
    from matplotlib.figure import Figure

    panels = [list(group) for _, group in groupby(rows, key=lambda row: row.case)]
    heights = [_BAR_HEIGHT * (len(panel) + 3) for panel in panels]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.5), layout='constrained')
    all_axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(all_axes, panels):
        times_ms = [row.ms_per_image for row in panel]
        colours = ['tab:blue' if row.candidate.split()[0] == 'ours' else 'lightgrey' for row in panel]
        bars = axes.barh([row.candidate for row in panel], times_ms, color=colours)
        axes.bar_label(bars, [f' {number(value)}' for value in times_ms], fontsize=7)
        axes.invert_yaxis()  # ours on top
        ceiling_ms = panel[0].gflop_per_image / panel[0].ceiling_tflop_per_s
        axes.axvline(ceiling_ms, color='tab:red', linewidth=1)
        axes.set_xlim(0, 1.15 * max(*times_ms, ceiling_ms))
        axes.set_title(str(panel[0].case), fontsize=8)
        axes.set_xlabel(f'ms per image; line: ours at the ceiling, {number(ceiling_ms)}', fontsize=7)
        axes.tick_params(labelsize=7)
    machines = sorted({str(row.machine) for row in rows})
    title = '\n'.join(fill(machine, _TITLE_WIDTH, break_on_hyphens=False) for machine in machines)
    figure.suptitle(title, fontsize=7, parse_math=False)
    return figure


def measured() -> list[Row]:
    """The rows that come with the package."""
    return read(Path(__file__).with_name('measured.jsonl'), Row)


def read(path: Path, row_type: type[T]) -> list[T]:
    """Rows of a file of JSON lines, none if it does not exist.

    Raises:
        ValueError: It is not a file of such rows.
    """
    text = read_text(path) if path.exists() else ''
    try:
        return [row_type(**json.loads(line, object_hook=_part)) for line in text.splitlines()]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path} is not a file of measured rows, one JSON object per line: {error!r}') from error


def _part(values: dict[str, Any]) -> Any:
    """The case or the machine of a row, where these are its values."""
    if 'img_size' in values:
        return Case(**{**values, 'img_size': tuple(values['img_size'])})
    return Machine(**values) if 'cpu' in values else values


def json_line(row: Any) -> str:
    """A row, a dataclass, as a line of such a file."""
    return f'{json.dumps(asdict(row))}\n'


def write(path: Path, rows: Iterable[Any]) -> None:
    """Write rows as such a file."""
    with replaced(path) as part:
        part.write_text(''.join(map(json_line, rows)), encoding='utf-8')


def record(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a file, in place of older ones of the same case, candidate and processor.

    Raises:
        ValueError: `path` exists and is not a file of rows.
    """
    merged = {(row.case, row.candidate, row.machine.cpu, row.machine.gpu): row for row in [*read(path, Row), *rows]}
    write(path, merged.values())

"""Rows of measurements: as tables, and as files of JSON lines. Nothing here needs torch."""
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from ..checks import read_text
from ..files import replaced
from .cases import Case
from .machine import Machine

__all__ = [
    'SPEEDUPS', 'Row', 'json_line', 'markdown', 'markdown_of_case', 'measured', 'number', 'read', 'record', 'table']

T = TypeVar('T')

_MEASURED = Path(__file__).with_name('measured.jsonl')
SPEEDUPS = 'vs ours, vs baseline: the time of that one divided by the time of this one; above 1x, this one is faster'
_HEADER = (
    'candidate', 'ms/image', 'images/s', 'vs ours', 'vs baseline', 'TFLOP/s', 'of ceiling', 'peak MiB', 'IQR',
    'kernels')


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

    @classmethod
    def of_json(cls, case: dict[str, Any], machine: dict[str, Any], **values: Any) -> 'Row':
        case['img_size'] = tuple(case['img_size'])
        return cls(Case(**case), machine=Machine(**machine), **values)


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
    return f'{title}:\n\n{table(_HEADER, map(_cells, rows))}'


def _cells(row: Row) -> tuple[str, ...]:
    latency = f' (p95 {number(row.p95_ms / row.case.batch)})' if row.case.mode == 'latency' else ''
    return (
        row.candidate,
        f'{number(row.ms_per_image)}{latency}',
        number(1000 / row.ms_per_image),
        'outputs differ' if row.speedup_over_ours is None else f'{row.speedup_over_ours:.2f}x',
        '' if row.speedup_over_baseline is None else f'{row.speedup_over_baseline:.2f}x',
        number(row.tflop_per_s),
        f'{row.tflop_per_s / row.ceiling_tflop_per_s:.0%}',
        '' if row.peak_memory_mib is None else f'{row.peak_memory_mib:.1f}',
        f'{row.relative_iqr:.1%}',
        ', '.join(row.kernels),
    )


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


def measured() -> list[Row]:
    """The rows that come with the package."""
    return read(_MEASURED, Row.of_json)


def read(path: Path, make: Callable[..., T]) -> list[T]:
    """Rows of a file.

    Args:
        path: A file of JSON lines.
        make: Makes a row of the values of a line, by name.

    Raises:
        ValueError: It is not a file of such rows.
    """
    text = read_text(path)
    try:
        return [make(**json.loads(line)) for line in text.splitlines()]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path} is not a file of measured rows, one JSON object per line: {error!r}') from error


def json_line(row: Any) -> str:
    """A row, a dataclass, as a line of such a file."""
    return f'{json.dumps(asdict(row))}\n'


def record(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a file, in place of older ones of the same case, candidate and processor.

    Raises:
        ValueError: `path` exists and is not a file of rows.
    """
    merged = {_key(row): row for row in [*(read(path, Row.of_json) if path.exists() else []), *rows]}
    with replaced(path) as part:
        part.write_text(''.join(map(json_line, merged.values())), encoding='utf-8')


def _key(row: Row) -> tuple[object, ...]:
    return row.case, row.candidate, row.machine.cpu, row.machine.gpu

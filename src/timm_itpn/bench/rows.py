"""Rows of measurements: as tables, and as a file of JSON lines."""
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

from .cases import Case

__all__ = [
    'HEADER', 'case_of', 'cells', 'committed_text', 'heading', 'is_ours', 'lines_as_markdown', 'markdown_table',
    'measured', 'read', 'record', 'same_function', 'setting',
]

HEADER = (
    'contestant', 'ms/image', 'spread', 'images/s', 'TFLOP/s', 'of ceiling', 'peak MiB', 'time / ours',
    'vs baseline', 'attention kernel')
MARKDOWN = (  # what is in the Markdown table
    'contestant', 'ms/image', 'vs ours', 'vs baseline', 'TFLOP/s', 'of ceiling', 'peak MiB', 'spread',
    'attention kernel')
LATER_FIELDS = ('pyramid',)  # of `Case`; older rows lack them
MEASURED = resources.files('timm_itpn.bench') / 'measured.jsonl'

Row = dict[str, Any]


def case_of(row: Row) -> Case:
    row = {**{field: Case._field_defaults[field] for field in LATER_FIELDS}, **row}
    return Case(**{field: row[field] for field in Case._fields})


def same_function(row: Row) -> bool:
    """True if the outputs have to agree with ours."""
    return bool(row.get('same_function', row['output_error'] is not None))  # older rows lack it


def is_ours(row: Row) -> bool:
    """True if the row is of our model, or of what was made of it."""
    return bool(row['contestant'].split()[0] == 'ours')


def heading(row: Row) -> str:
    """The case of a row, and the ceiling."""
    ceiling, mm = row['ceiling_tflop_per_s'], row['mm_tflop_per_s']
    return f'{case_of(row)}; ceiling {ceiling:.4g} TFLOP/s (torch.mm alone {mm:.4g})'


def setting(row: Row) -> str:
    """Machine, versions and date of a row."""
    where = row['machine'] if row['gpu'] else f'{row["machine"]}, threads: {row["threads"]}, cores: {row["cores"]}'
    versions = ', '.join(f'{name} {row[name]}' for name in ('python', 'torch', 'timm', 'timm_itpn'))
    return f'{where}; {versions}; {row["date"]}'


def cells(row: Row, names: Sequence[str] = HEADER) -> tuple[str, ...]:
    """A row of the table under `names`."""
    latency = f' (p95 {row["p95_ms"]:.4g})' if row['mode'] == 'latency' else ''
    texts = {
        'contestant': row['contestant'],
        'ms/image': f'{row["ms_per_image"]:.4g}{latency}',
        'spread': f'{row["spread"]:.1%}',
        'images/s': f'{row["images_per_s"]:.4g}',
        'TFLOP/s': f'{row["tflop_per_s"]:.4g}',
        'of ceiling': f'{row["share_of_ceiling"]:.0%}',
        'peak MiB': '' if row['peak_memory_mib'] is None else f'{row["peak_memory_mib"]:.1f}',
        'time / ours': 'outputs differ' if row['ratio'] is None else f'{row["ratio"]:.3f}',
        'vs ours': f'{1 / row["ratio"]:.2f}x' if is_ours(row) and row['ratio'] else '',
        'vs baseline': '' if row['speedup_over_baseline'] is None else f'{row["speedup_over_baseline"]:.2f}x',
        'attention kernel': ', '.join(row['kernels']),
    }
    return tuple(texts[name] for name in names)


def markdown_table(rows: Iterable[Row]) -> str:
    """Rows as Markdown: a table for each machine, versions and date, which stand above it.

    The first row of a case names it.
    """
    parts = []
    for where, group in groupby(sorted(rows, key=setting), key=setting):
        lines = [
            ('' if i else str(case), *cells(row, MARKDOWN))
            for case, rows_of_case in groupby(group, key=case_of) for i, row in enumerate(rows_of_case)]
        parts.append(f'{where}:\n\n{lines_as_markdown(("case", *MARKDOWN), lines)}')
    return '\n\n'.join(parts)


def lines_as_markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table of texts."""
    return '\n'.join(f'| {" | ".join(texts)} |' for texts in (header, ['---'] * len(header), *lines))


def measured() -> list[Row]:
    """The rows that come with the package.

    Raises:
        RuntimeError: There are none.
    """
    return parse(committed_text(MEASURED), str(MEASURED))


def committed_text(file: Any) -> str:
    """Text of a file of rows that comes with the package.

    Args:
        file: A path, or a resource.

    Raises:
        RuntimeError: There is none.
    """
    if not file.is_file():
        raise RuntimeError(f'no measured rows come with this version: there is no {file}')
    return str(file.read_text(encoding='utf-8'))


def read(path: Path) -> list[Row]:
    """Rows of a file, none if it does not exist.

    Raises:
        ValueError: It is no file of rows.
    """
    return parse(path.read_text(encoding='utf-8'), str(path)) if path.exists() else []


def parse(text: str, name: str) -> list[Row]:
    try:
        rows = [json.loads(line) for line in text.splitlines() if line]
        for row in rows:
            key(row)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{name} is no file of measured rows, one JSON object per line: {error!r}') from error
    return rows


def record(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a file of JSON lines, in place of older ones of the same case, contestant and machine.

    The file is written whole or not at all.

    Raises:
        ValueError: `path` exists and is no file of rows.
    """
    from ..files import replaced

    merged = {key(row): row for row in read(path)}
    merged.update({key(row): row for row in rows})
    with replaced(path) as part:
        part.write_text(''.join(f'{json.dumps(row)}\n' for row in merged.values()), encoding='utf-8')


def key(row: Row) -> tuple[Any, ...]:
    """What a row replaces another by."""
    return (*case_of(row), row['contestant'], row['machine'])

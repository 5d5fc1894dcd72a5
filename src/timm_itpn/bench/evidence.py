"""What experiments showed, as a table: means over seeds. The committed rows are in `token_quality.jsonl`."""
import json
import statistics
from importlib import resources
from typing import Any, Dict, List, Optional, Sequence

from .rows import markdown_line, setting

__all__ = ['evidence', 'markdown_table']

Row = Dict[str, Any]

HEADER = (
    'setting', 'top-1 as it is', 'mIoU as it is', 'top-1 tuned', 'against off', 'mIoU tuned', 'against off', 'seeds')
OFF = 'off'  # what the others are compared with
EVIDENCE = resources.files('timm_itpn.bench') / 'token_quality.jsonl'


def evidence() -> List[Row]:
    """The rows that come with the package.

    Raises:
        RuntimeError: There are none.
    """
    if not EVIDENCE.is_file():
        raise RuntimeError(f'no measured rows come with this version: there is no {EVIDENCE}')
    return [json.loads(line) for line in EVIDENCE.read_text(encoding='utf-8').splitlines()]


def markdown_table(rows: Sequence[Row]) -> str:
    """Means over seeds in percent, one line per setting in the order of the rows; machine and versions stand above."""
    by_key = {(row['setting'], row['tuned'], row['seed']): row for row in rows}
    lines = [f'{setting(rows[0])}:', '', markdown_line(HEADER), markdown_line(['---'] * len(HEADER))]
    for name in dict.fromkeys(row['setting'] for row in rows):
        seeds = sorted({row['seed'] for row in rows if row['setting'] == name})

        def mean(value: str, tuned: bool, name: str = name, seeds: Sequence[int] = tuple(seeds)) -> Optional[float]:
            values = [by_key[name, tuned, seed][value] for seed in seeds if (name, tuned, seed) in by_key]
            return statistics.fmean(values) if values else None

        texts = [name, *(percent(mean(value, tuned=False)) for value in ('top1', 'miou'))]
        for value in ('top1', 'miou'):
            here, off = mean(value, tuned=True), mean(value, tuned=True, name=OFF)
            difference = '' if here is None or off is None or name == OFF else f'{here - off:+.2f}'
            texts += [percent(here), difference]
        lines.append(markdown_line((*texts, str(len(seeds)))))
    return '\n'.join(lines)


def percent(value: Optional[float]) -> str:
    return '' if value is None else f'{value:.2f}'

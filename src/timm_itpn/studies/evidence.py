"""The experiments on small real data by name, and what they showed: the rows in `<name>.jsonl`."""
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from ..bench.rows import committed_text, setting
from . import acceleration, pretraining

__all__ = ['STUDIES', 'committed', 'markdown']

Row = dict[str, Any]

STUDIES: dict[str, Any] = {'acceleration': acceleration, 'pretraining': pretraining}
FOLDER = resources.files('timm_itpn.studies')


def committed(name: str) -> list[Row]:
    """The rows of a study that come with the package.

    Raises:
        RuntimeError: There are none.
    """
    return [json.loads(line) for line in committed_text(FOLDER / f'{name}.jsonl').splitlines()]


def markdown(name: str, rows: Sequence[Row]) -> str:
    """The table of a study; machine and versions stand above it."""
    return f'{setting(rows[0])}:\n\n{STUDIES[name].markdown_table(rows)}'

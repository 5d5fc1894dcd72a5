"""A chart of rows: one panel per case, with the ceiling as a line; of several sizes, how the cost grows with them."""
import importlib.util
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from textwrap import fill
from typing import Any

from .cases import STRIDE, height_width
from .rows import Row, case_of, is_ours, setting

__all__ = ['check_output', 'draw', 'save']

NUM_COLUMNS = 2
PANEL_WIDTH = 5.6  # inches
BAR_HEIGHT = 0.32  # inches
TITLE_WIDTH = 60  # characters over a panel
OURS_COLOUR, OTHERS_COLOUR = 'tab:blue', 'lightgrey'
MIN_SIZES = 3  # for lines over the number of tokens
COSTS = {'gflop_per_image': 'GFLOP per image', 'ms_per_image': 'ms per image'}


def check_output(path: Path) -> None:
    """Raise before anything is measured if a chart could not be written to `path`.

    Raises:
        RuntimeError: matplotlib is missing.
        ValueError: `path` is no name of a PNG file, or is in no folder.
    """
    if importlib.util.find_spec('matplotlib') is None:
        raise RuntimeError("--plot needs matplotlib: pip install 'timm-itpn[demo]'")
    if path.suffix.lower() != '.png':
        raise ValueError(f'{path} is no name of a PNG file: let --plot end in .png')
    if not path.parent.is_dir():
        raise ValueError(f'{path} cannot be written: there is no folder {path.parent}')


def draw(rows: Sequence[Row]) -> Any:
    """Bars of milliseconds per image. The line is what our model would take at the rate of the ceiling.

    Args:
        rows: Rows of one case next to each other.

    Returns:
        The matplotlib figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [list(group) for _, group in groupby(rows, key=case_of)]
    costs = tuple(COSTS) if differ_by_size(rows) else ()
    num_columns = min(NUM_COLUMNS, len(panels))
    num_rows = math.ceil(len(panels) / num_columns) + bool(costs)
    panel_height = BAR_HEIGHT * max(map(len, panels)) + 1.1
    figure = Figure(figsize=(PANEL_WIDTH * num_columns, panel_height * num_rows + 0.7), layout='constrained')
    FigureCanvasAgg(figure)
    for number, panel in enumerate(panels):
        draw_case(figure.add_subplot(num_rows, num_columns, number + 1), panel)
    for number, cost in enumerate(costs):
        draw_growth(figure.add_subplot(num_rows, NUM_COLUMNS, NUM_COLUMNS * (num_rows - 1) + number + 1), rows, cost)
    settings = [fill(text, TITLE_WIDTH * num_columns) for text in sorted({setting(row) for row in rows})]
    figure.suptitle('\n'.join(settings), fontsize=8, parse_math=False)
    return figure


def draw_case(axes: Any, rows: list[Row]) -> None:
    times_ms = [row['ms_per_image'] for row in rows]
    colours = [OURS_COLOUR if is_ours(row) else OTHERS_COLOUR for row in rows]
    bars = axes.barh([row['contestant'] for row in rows], times_ms, color=colours)
    axes.bar_label(bars, [f' {value:.4g}' for value in times_ms], fontsize=8)
    axes.invert_yaxis()  # ours on top
    ceiling_ms = rows[0]['gflop_per_image'] / rows[0]['ceiling_tflop_per_s']  # GFLOP / (GFLOP per ms)
    axes.axvline(ceiling_ms, color='tab:red', linewidth=1)
    axes.set_xlim(0, 1.18 * max(*times_ms, ceiling_ms))
    axes.set_title(fill(str(case_of(rows[0])), TITLE_WIDTH), fontsize=9)
    axes.set_xlabel(f'ms per image; line: ours at the ceiling, {ceiling_ms:.4g}', fontsize=8)
    axes.tick_params(labelsize=8)


def differ_by_size(rows: Sequence[Row]) -> bool:
    """True if the cases are of several sizes, and else the same."""
    cases = {case_of(row) for row in rows}
    return len(cases) >= MIN_SIZES and len({case._replace(size=0) for case in cases}) == 1


def draw_growth(axes: Any, rows: Sequence[Row], cost: str) -> None:
    """A line per contestant: what it costs by the number of tokens."""
    for name in dict.fromkeys(row['contestant'] for row in rows):
        points = sorted((num_tokens(row), row[cost]) for row in rows if row['contestant'] == name)
        axes.plot(*zip(*points), marker='o', markersize=3, linewidth=1, label=name)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel('tokens of stage 3', fontsize=8)
    axes.set_ylabel(COSTS[cost], fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7)


def num_tokens(row: Row) -> int:
    height, width = height_width(row['size'])
    return height * width // STRIDE ** 2


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, all or nothing."""
    from ..files import replaced

    with replaced(path) as part:
        figure.savefig(part, dpi=120, format='png')

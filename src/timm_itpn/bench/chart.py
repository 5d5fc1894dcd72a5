"""A chart of rows: one panel per case, a bar per candidate, and the ceiling as a line."""
from collections.abc import Sequence
from itertools import groupby
from textwrap import fill
from typing import TYPE_CHECKING

from .rows import Row, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['draw']

_WIDTH = 6.  # inches
_BAR_HEIGHT = 0.3  # inches
_TITLE_WIDTH = 85  # characters


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
        _draw_case(axes, panel)
    machines = sorted({str(row.machine) for row in rows})
    title = '\n'.join(fill(machine, _TITLE_WIDTH, break_on_hyphens=False) for machine in machines)
    figure.suptitle(title, fontsize=7, parse_math=False)
    return figure


def _draw_case(axes: 'Axes', rows: Sequence[Row]) -> None:
    times_ms = [row.ms_per_image for row in rows]
    colours = ['tab:blue' if row.candidate.split()[0] == 'ours' else 'lightgrey' for row in rows]
    bars = axes.barh([row.candidate for row in rows], times_ms, color=colours)
    axes.bar_label(bars, [f' {number(value)}' for value in times_ms], fontsize=7)
    axes.invert_yaxis()  # ours on top
    ceiling_ms = rows[0].gflop_per_image / rows[0].ceiling_tflop_per_s
    axes.axvline(ceiling_ms, color='tab:red', linewidth=1)
    axes.set_xlim(0, 1.15 * max(*times_ms, ceiling_ms))
    axes.set_title(str(rows[0].case), fontsize=8)
    axes.set_xlabel(f'ms per image; line: ours at the ceiling, {number(ceiling_ms)}', fontsize=7)
    axes.tick_params(labelsize=7)

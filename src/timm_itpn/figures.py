"""PNG files of matplotlib figures: checked before the work, written whole or not at all after it.

A figure is a plain `matplotlib.figure.Figure`, which needs neither pyplot nor a display.
"""
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checks import check_output, require
from .files import replaced

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['check', 'save']


def check(path: Path, option: str, **how: Any) -> None:
    """Raise RuntimeError without matplotlib; ValueError unless `check_output` allows the PNG file."""
    require('a figure', 'demo', 'matplotlib')
    check_output(path, option, '.png', **how)


def save(figure: 'Figure', path: Path, dpi: int = 120) -> None:
    """Write a figure as PNG."""
    with replaced(path) as part:
        figure.savefig(part, dpi=dpi, format='png')

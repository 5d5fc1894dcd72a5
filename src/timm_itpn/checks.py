"""What a command checks before it starts work, each error a sentence that says what to do; and before it prints."""
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any


def require(purpose: str, extra: str, *packages: str) -> None:
    """Raise RuntimeError unless all packages are installed.

    Args:
        purpose: What needs them, as the subject of the sentence.
        extra: Extra of this package that installs them.
        packages: Names to import them by.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"{purpose} needs {', '.join(missing)}: pip install 'timm-itpn[{extra}]'")


def check_output(path: Path) -> None:
    """Raise ValueError or OSError unless a file can be written, which may exist already."""
    if not path.parent.is_dir():
        raise ValueError(f'{path} cannot be written: there is no folder {path.parent}')
    check_regular_file(path)
    tempfile.TemporaryDirectory(prefix=f'.{path.name}.', dir=path.parent).cleanup()  # OSError if that cannot be


def check_figure(path: Path, option: str) -> None:
    """As `check_output`, for a PNG file that matplotlib draws; also raise RuntimeError if that is not installed."""
    require('a figure', 'demo', 'matplotlib')
    if not path.name.lower().endswith('.png'):
        raise ValueError(f'{path} is not a PNG file name; {option} must end in .png')
    check_output(path)


def check_new(path: Path, option: str, remedy: str = 'move it away') -> None:
    """Raise ValueError if there is something at a path, or a file where a folder above it should be."""
    if os.path.lexists(path):
        raise ValueError(f'{path} exists already: {remedy}, or name another with {option}')
    check_folder(path, option)


def check_folder(path: Path, option: str) -> None:
    """Raise ValueError if there is something else than a folder at a path, or where a folder above it should be."""
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise ValueError(f'{path} cannot be written: {there} is not a folder; name another with {option}')


def check_regular_file(path: Path) -> None:
    """Raise ValueError if there is something else than a file at a path: reading a pipe or a device may never end."""
    if path.exists() and not path.is_file():
        raise ValueError(f'{path} is {"a folder" if path.is_dir() else "not a regular file"}: name a file')


def read_text(path: Path) -> str:
    """Text of a file.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is not a regular file, or not a text.
    """
    check_regular_file(path)
    try:
        return path.read_text(encoding='utf-8-sig')  # Windows may put a mark first
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not a text file: name another') from error


def printable(text: str, most: int = 1000) -> str:
    """Text with escapes in place of what a terminal would obey, such as control characters, and cut if it is long."""
    cut = text if len(text) <= most else f'{text[:most]}...'
    return ''.join(char if char.isprintable() else char.encode('unicode_escape').decode('ascii') for char in cut)


def is_number(value: Any, low: float = -1e15, high: float = 1e15) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high  # NaN is not


def are_numbers(values: Any, low: float = -1e15, high: float = 1e15) -> bool:
    """Whether a value is a list of at least one number, each within bounds."""
    return isinstance(values, (list, tuple)) and len(values) > 0 and all(is_number(x, low, high) for x in values)


def check_device(device: str) -> None:
    """Raise RuntimeError unless PyTorch can put a tensor on a device."""
    import torch

    try:
        torch.zeros(1, device=device).item()  # meta has no numbers
    except (AssertionError, RuntimeError) as error:  # AssertionError: this build of torch is without the device
        raise RuntimeError(f'device {device!r} cannot be used: {str(error).partition(". ")[0]}') from error

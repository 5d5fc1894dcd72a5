"""What a command checks before it starts long work. Each error is one sentence that says what to do."""
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

__all__ = [
    'are_numbers', 'check_device', 'check_new', 'check_output', 'check_regular_file', 'is_number', 'read_text',
    'require']

_MOVE = 'move it away'


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


def check_output(path: Path, option: str, suffix: str = '', overwrite: bool = False, remedy: str = _MOVE) -> None:
    """Raise ValueError or OSError unless a file can be written.

    Args:
        path: File.
        option: Option that names it.
        suffix: What its name must end in.
        overwrite: It may exist already.
        remedy: What to do if it exists and may not.
    """
    if not path.name.lower().endswith(suffix):
        raise ValueError(f'{path} is not a {suffix[1:].upper()} file name; {option} must end in {suffix}')
    if not path.parent.is_dir():
        raise ValueError(f'{path} cannot be written: there is no folder {path.parent}')
    if overwrite:
        check_regular_file(path)
    else:
        check_new(path, option, remedy)
    tempfile.TemporaryDirectory(prefix=f'.{path.name}.', dir=path.parent).cleanup()  # OSError if that cannot be


def check_new(path: Path, option: str, remedy: str = _MOVE) -> None:
    """Raise ValueError if there is something at a path, or a file where a folder above it should be."""
    if os.path.lexists(path):
        raise ValueError(f'{path} exists already: {remedy}, or name another with {option}')
    above = next(folder for folder in path.parents if os.path.lexists(folder))
    if not above.is_dir():
        raise ValueError(f'{path} cannot be written: {above} is not a folder; name another with {option}')


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

"""Files that are written whole or not at all."""
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .checks import check_new

__all__ = ['created', 'replaced']


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a path to write a file or a folder to; it takes the place of `path` if no error occurs.

    Args:
        path: A file, which may exist, or a folder, which must not.
    """
    beside = Path(tempfile.mkdtemp(prefix=f'.{path.name}.', dir=path.parent))  # there, os.replace is atomic
    try:
        yield beside / path.name
        os.replace(beside / path.name, path)
    finally:
        shutil.rmtree(beside)


@contextlib.contextmanager
def created(path: Path, option: str) -> Iterator[Path]:
    """As `replaced`, for what must be new; missing folders above it are made, and go again if an error occurs.

    Args:
        path: A file or a folder.
        option: Option that names it.

    Raises:
        ValueError: It exists.
    """
    check_new(path, option)
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as part:
            yield part
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # not there, or somebody else's files are in it by now
                folder.rmdir()
        raise

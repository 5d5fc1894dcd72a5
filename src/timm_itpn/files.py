"""Files that are written whole or not at all."""
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ['replaced']


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

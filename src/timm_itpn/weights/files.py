"""Files that are written whole or not at all."""
import contextlib
import os
import shutil
from pathlib import Path
from typing import Iterator

__all__ = ['replaced']


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a new name beside `path` to write a file or a folder to; it takes the place of `path` if no error occurs.

    Args:
        path: A file, which may exist, or a folder, which must not.
    """
    part = path.with_name(f'.{path.name}.{os.getpid()}.part')  # in the same folder: there, os.replace is atomic
    try:
        yield part
        os.replace(part, path)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)

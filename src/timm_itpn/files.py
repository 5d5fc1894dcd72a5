"""Files that are written whole or not at all."""
import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .checks import check_new

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError: there is no room for a file


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a path to write a file or a folder to; it takes the place of `path`, on the disk, if no error occurs.

    Args:
        path: A file, which may exist, or a folder, which must not.

    Raises:
        OSError: There is no room, whatever the writer makes of that.
    """
    beside = Path(tempfile.mkdtemp(prefix=f'.{path.name}.', dir=path.parent))  # there, os.replace is atomic
    part, plain = beside / path.name, beside / 'plain'
    try:
        yield part
        plain.touch()
        for written in (part, *part.rglob('*')):
            if written.is_file():
                written.chmod(plain.stat().st_mode)  # safetensors lets nobody else read its files
            _flush(written)
        os.replace(part, path)
        _flush(path.parent)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # safetensors says '(os error 28)', torch 'unexpected pos' and nothing more
            number = re.search(r'\b(?:os error |Errno )(\d+)|unexpected pos', str(cause))
            if number and (code := int(number[1] or errno.ENOSPC)) in FULL:
                raise OSError(code, os.strerror(code), str(path)) from error
            cause = cause.__context__
        raise
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


def save_figure(figure: Any, path: Path) -> None:
    """Write a `matplotlib.figure.Figure`, which needs neither pyplot nor a display, as PNG."""
    with replaced(path) as part:
        figure.savefig(part, dpi=120, format='png')


def _flush(path: Path) -> None:
    """Wait until a file or the list of files in a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Whether a file is a whole weight file, and the one that its name says."""
import functools
import hashlib
import os
from pathlib import Path

from ..checks import check_regular_file
from .read import UnreadableError, read_contents
from .sources import SOURCES, file_name

__all__ = ['check_published', 'sha256_of', 'why_no_weight_file', 'why_not_expected']

CHUNK_BYTES = 1 << 20


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, in hex; a process computes it once, and again if the file has changed.

    Raises:
        OSError: It cannot be read.
        ValueError: It is a folder, a pipe or a device.
    """
    check_regular_file(Path(path))
    found = os.stat(path)
    return _sha256(os.path.abspath(path), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@functools.cache
def _sha256(path: str, *_: int) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def why_not_expected(path: Path, name: str = '') -> str:
    """Why a file is not the published one of its name, or of `name`, as a phrase that ends 'the file is ...'.

    '' if it is, or if there is none of this name with a known SHA-256.
    """
    published = (source for key, source in SOURCES.items() if file_name(key) == (name or path.name))
    known = next((source.sha256 for source in published if source.sha256), None)
    found = sha256_of(path) if known else None
    return '' if found == known else f'not the published file of this name (its SHA-256 is {found}, not {known})'


def check_published(path: Path) -> None:
    """Raise ValueError if a file has the name of a published one, but not its SHA-256, where that is known."""
    if why := why_not_expected(path):
        raise UnreadableError(path, why, ': get it again, or give it another name if it is your own')


def why_no_weight_file(path: str | Path) -> str:
    """Why a file is not a whole weight file, as a phrase that ends 'the file is ...'; '' if it is one.

    Raises:
        OSError: It cannot be opened.
    """
    try:
        read_contents(Path(path))
    except UnreadableError as error:
        return error.reason
    return ''

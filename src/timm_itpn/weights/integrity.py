"""Whether a file is a whole weight file, and which one."""
import hashlib
import zipfile
from pathlib import Path

from .read import DAMAGED, UnreadableError, read_contents

__all__ = ['sha256_of', 'why_no_weight_file']

CHUNK_BYTES = 1 << 20


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, in hex.

    Raises:
        OSError: It cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def why_no_weight_file(path: str | Path) -> str:
    """Why a file is not a whole weight file, as a phrase that ends 'the file is ...'; '' if it is one.

    Files of `torch.save` (zip) must have the right checksum in every entry, so those written after
    `torch.serialization.set_crc32_options(False)` count as damaged. Safetensors files, and those of `torch.save` from
    before torch 1.6, have no checksums: of them only the structure is checked.

    Raises:
        OSError: It cannot be opened.
    """
    try:
        if read_contents(Path(path), meta=True).format != 'zip pickle':
            return ''
    except UnreadableError as error:
        return error.reason
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, RuntimeError, ValueError, EOFError):  # of damaged headers
        return DAMAGED
    return f'{DAMAGED} (wrong checksum of {bad})' if bad else ''

"""Whether a file is a whole weight file, told from its bytes alone: nothing is unpickled, and torch is not needed.

Sources: APPNOTE.TXT of the zip format, the magic number and zip layout of `torch.save`, the format of safetensors.
"""
import errno
import hashlib
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open

__all__ = ['HEAD_BYTES', 'is_web_page', 'is_weight_start', 'sha256_of', 'what_instead', 'why_no_weight_file']

HEAD_BYTES = 1024  # enough to know a kind of file by
CHUNK_BYTES = 1 << 20
ZIP_START = b'PK\x03\x04'
GIT_LFS_START = b'version https://git-lfs'
ZIP_END = b'PK\x05\x06'
ZIP_END_BYTES = 22  # without its comment
LEGACY_START = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # the magic number 0x1950a86a20f9469cfc6c, pickled
SAFETENSORS_LENGTH_BYTES = 8  # of the header, which is JSON and follows at once
DAMAGED = 'truncated or damaged'
ZIP_ERRORS = (  # what zipfile raises on damaged files, besides its own
    zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OverflowError, RuntimeError, ValueError)


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
    `torch.serialization.set_crc32_options(False)` count as damaged. Safetensors files must have just the length that
    their header tells. Files of `torch.save` in its format from before torch 1.6, a sequence of pickles, have neither
    checksum nor length: of them only the first bytes are looked at, and a truncated one passes.

    Raises:
        OSError: It cannot be read.
    """
    with open(path, 'rb') as file:
        head = file.read(HEAD_BYTES)
    instead = what_instead(head)
    if instead:
        return instead
    if head.startswith(ZIP_START):
        return _why_no_torch_zip(path)
    if _is_safetensors_start(head):
        return _why_no_safetensors(path)
    return '' if head.startswith(LEGACY_START) else 'no weight file'


def what_instead(head: bytes) -> str:
    """What a file that starts with these bytes is in place of a weight file, '' if it may be one."""
    if not head:
        return 'empty'
    if is_web_page(head):
        return 'a web page, not a weight file'
    return 'a note of Git LFS, not the weight file itself' if head.startswith(GIT_LFS_START) else ''


def is_web_page(head: bytes) -> bool:
    """Whether a file that starts with these bytes is HTML."""
    text = head.removeprefix(b'\xef\xbb\xbf').lstrip().lower()
    return text.startswith((b'<!doctype html', b'<html', b'<head', b'<?xml'))


def is_weight_start(head: bytes) -> bool:
    """Whether a file that starts with these bytes may be a weight file."""
    return head.startswith((ZIP_START, LEGACY_START)) or _is_safetensors_start(head)


def _is_safetensors_start(head: bytes) -> bool:
    return head[SAFETENSORS_LENGTH_BYTES:SAFETENSORS_LENGTH_BYTES + 1] == b'{'


def _why_no_torch_zip(path: str | Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if not any(PurePosixPath(entry.filename).name == 'data.pkl' for entry in entries):
                return 'a zip archive, but none of torch.save'
            bad = archive.testzip()
            first = min(entry.header_offset for entry in entries)
            end_bytes = ZIP_END_BYTES + len(archive.comment)
    except ZIP_ERRORS:
        return DAMAGED
    except OSError as error:
        if error.errno == errno.EINVAL:  # a damaged entry led to before the start of the file
            return DAMAGED
        raise
    if bad is not None:
        return f'{DAMAGED} (wrong checksum of {bad})'
    with open(path, 'rb') as file:
        file.seek(-end_bytes, 2)
        ends_there = file.read().startswith(ZIP_END)
    return '' if first == 0 and ends_there else f'{DAMAGED} (surplus bytes)'  # zipfile and torch would pass over them


def _why_no_safetensors(path: str | Path) -> str:
    try:
        with safe_open(path, framework='np'):  # checks the header and compares its lengths with the file's
            return ''
    except SafetensorError:
        return DAMAGED

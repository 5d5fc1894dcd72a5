"""What is in a weight file: names, shapes and dtypes, read without running its code and without the tensors' data."""
import io
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from .inert_pickle import DTYPES, Machine, Opaque, Refused, check_tree, meta_tensor
from .integrity import HEAD_BYTES, what_instead

__all__ = ['Contents', 'Opaque', 'read_contents']

MAX_PICKLE_BYTES = 64 * 2 ** 20  # 10,000 tensors take 2 MiB; the rest is for text and arrays that lie among them
LEGACY_START = [0x1950a86a20f9469cfc6c, 1001]  # magic number and protocol, one pickle each
UNREADABLE = (  # what the parsers raise on bytes that are not theirs
    ValueError, LookupError, TypeError, EOFError, OSError, RuntimeError,
    zipfile.BadZipFile, zlib.error, SafetensorError)
SAFETENSORS_DTYPES = {
    'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16', 'C64': 'complex64',
    'I64': 'int64', 'I32': 'int32', 'I16': 'int16', 'I8': 'int8', 'BOOL': 'bool',
    'U64': 'uint64', 'U32': 'uint32', 'U16': 'uint16', 'U8': 'uint8',
    'F8_E4M3': 'float8_e4m3fn', 'F8_E5M2': 'float8_e5m2', 'F8_E8M0': 'float8_e8m0fnu',
}


class Contents(NamedTuple):
    """What a weight file holds.

    Attributes:
        format: 'safetensors', 'zip pickle' or 'legacy pickle'.
        tree: Dicts, lists, tuples and sets of plain values; tensors are empty ones on device 'meta' with their shape
            and dtype; everything else is `Opaque`. It is a tree of at most `MAX_DEPTH` levels.
        globals: Sorted names of the classes and functions that the pickle asks for, besides `collections.OrderedDict`
            and those of which tensors and parameters are made.
        metadata: The text entries in the header of a safetensors file.
    """
    format: str
    tree: Any
    globals: tuple[str, ...]
    metadata: dict[str, str]


def read_contents(path: Path) -> Contents:
    """List what is in a weight file of any format, recognised by its first bytes, not by its name.

    Args:
        path: File of safetensors or of `torch.save`, in its present (zip) or its legacy form.

    Raises:
        ValueError: There is no such file, it cannot be read, or it is no weight file; one sentence says which.
    """
    if path.is_dir():
        raise ValueError(f'{path} is a folder, not a weight file.')
    try:
        file = path.open('rb')
    except FileNotFoundError as error:
        raise ValueError(f'{path} does not exist.') from error
    except OSError as error:
        raise ValueError(f'{path} cannot be read: {error.strerror}.') from error
    with file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        try:
            return _read(path, file, size)
        except Refused as refused:
            raise ValueError(f'{path} ({size} bytes) was not read: {refused}.') from refused
        except UNREADABLE as error:
            file.seek(0)
            what = what_instead(file.read(HEAD_BYTES)) or 'truncated or no weight file'
            raise ValueError(f'{path} ({size} bytes) is {what}: delete it and fetch it again.') from error


def _read(path: Path, file: BinaryIO, size: int) -> Contents:
    head = file.read(9)
    file.seek(0)
    if head.startswith(b'PK\x03\x04'):  # as torch.load tells them apart: a zip behind other bytes is none
        return _read_zip(file)
    if head[8:] == b'{':
        return _read_safetensors(path)
    return _read_legacy(file, size)


def _read_safetensors(path: Path) -> Contents:
    tree = {}
    with safe_open(str(path), framework='np') as file:
        for key in file.keys():
            view = file.get_slice(key)
            dtype = DTYPES.get(f'torch.{SAFETENSORS_DTYPES.get(view.get_dtype())}')
            if dtype is None:
                raise Refused(f'the dtype {view.get_dtype()} of {key} is not known to torch {torch.__version__}')
            tree[key] = meta_tensor(tuple(view.get_shape()), dtype)
        return Contents('safetensors', tree, (), dict(file.metadata() or {}))


def _read_zip(file: BinaryIO) -> Contents:
    with zipfile.ZipFile(file) as archive:
        # torch's reader does not tell upper from lower case, and takes the first of two entries where Python takes
        # the last
        found = [info for info in archive.infolist() if info.filename.lower().split('/')[1:] == ['data.pkl']]
        if len(found) != 1:
            raise Refused(f'it is a zip file with {len(found)} entries */data.pkl, where torch.save writes one')
        if found[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Refused('its data.pkl is packed in a way that torch cannot unpack')
        if found[0].file_size > MAX_PICKLE_BYTES:
            raise Refused(_too_large())
        pickled = archive.read(found[0])  # never more than its `file_size`
    machine = Machine()
    tree = machine.run(io.BytesIO(pickled))
    check_tree(tree)
    return Contents('zip pickle', tree, machine.unusual_globals(), {})


def _read_legacy(file: BinaryIO, size: int) -> Contents:
    """Magic number, protocol, system, object, storage keys, each a pickle; then the storages, each after its size."""
    stream, machine = _Bounded(file), Machine()
    try:
        start = [machine.run(stream), machine.run(stream)]
    except Refused as error:
        raise ValueError('no pickle that was ever meant for torch') from error
    if start != LEGACY_START:
        raise ValueError('no magic number')
    machine.run(stream)
    tree = machine.run(stream)
    machine.run(stream)
    if file.tell() + sum(8 + num_bytes for num_bytes in machine.storages.values()) > size:
        raise ValueError('storages are cut off')
    check_tree(tree)
    return Contents('legacy pickle', tree, machine.unusual_globals(), {})


def _too_large() -> str:
    return f'what it holds besides the data of tensors is more than {MAX_PICKLE_BYTES // 2 ** 20} MiB'


class _Bounded:
    """The start of a file: a pickle that says it has a string of a terabyte makes nobody reserve the memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def read(self, num_bytes: int) -> bytes:
        return self._checked(self.file.read(min(num_bytes, MAX_PICKLE_BYTES + 1)))

    def readline(self) -> bytes:
        return self._checked(self.file.readline(MAX_PICKLE_BYTES + 1))

    def _checked(self, found: bytes) -> bytes:
        if self.file.tell() > MAX_PICKLE_BYTES:
            raise Refused(_too_large())
        return found

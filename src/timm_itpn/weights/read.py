"""Reads weight files of any format without running what is pickled in them.

Weights need nothing but tensors and plain containers. Those are rebuilt; an inert stand-in replaces every other class
and function that a pickle names, so a file with a numpy scalar, an `argparse.Namespace` or somebody's own class is read
too. The data of tensors is mapped into memory, not read.
"""
import io
import mmap
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

__all__ = ['DAMAGED', 'Contents', 'StandIn', 'UnreadableError', 'read_contents', 'stand_in_name']

MAX_PICKLE_BYTES = 2 ** 30  # unpacked; 10,000 tensors take 2 MiB
MAX_DEPTH = 100  # of dicts and lists in one another, so that callers may recurse
MAX_VALUES = 4_000_000  # shared ones are counted each time, as a recursion meets them
ALIGNMENT = 16  # bytes; storages in legacy files begin anywhere
LEGACY_START = [0x1950a86a20f9469cfc6c, 1001]  # magic number and protocol, one pickle each
UNREADABLE = (  # what damaged files make the parsers raise
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError,
    pickle.PickleError, struct.error, zipfile.BadZipFile, zlib.error, SafetensorError)

HEAD_BYTES = 1024  # enough to know a kind of file by
ZIP_START = b'PK\x03\x04'
WEB_PAGE_STARTS = (b'<!doctype html', b'<html', b'<head', b'<?xml')
GIT_LFS_START = b'version https://git-lfs'
DAMAGED = 'truncated, damaged or not a weight file'

STORAGES = {f'torch.{name}Storage': dtype for name, dtype in dict(
    Double=torch.float64, Float=torch.float32, Half=torch.float16, BFloat16=torch.bfloat16, Long=torch.int64,
    Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8, Bool=torch.bool,
    ComplexDouble=torch.complex128, ComplexFloat=torch.complex64,
).items()}
STORAGES['torch.storage.UntypedStorage'] = torch.uint8  # counted in bytes; the dtype is an argument of the tensor
TENSOR_TYPES = ('torch.Tensor', 'torch.nn.parameter.Parameter', 'torch.nn.parameter.Buffer')
DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class Contents(NamedTuple):
    """What a weight file holds."""
    format: str  # 'safetensors', 'zip pickle' or 'legacy pickle'
    # dicts, lists, tuples and sets of tensors and plain values, at most `MAX_DEPTH` levels deep; everything else is a
    # `StandIn`
    tree: Any
    globals: tuple[str, ...]  # sorted names of the classes and functions that stand-ins replace
    metadata: dict[str, str]  # the text entries in the header of a safetensors file


class UnreadableError(ValueError):
    """A file is not read; the message says which and why.

    Attributes:
        reason: Why, as a phrase that ends 'the file is ...'.
    """

    def __init__(self, path: Path, reason: str, advice: str = '') -> None:
        super().__init__(f'{path} ({path.stat().st_size} bytes) is {reason}{advice}.')
        self.reason = reason


class StandIn:
    """Takes the place of an object, a class or a function of a pickle, and does nothing.

    State and items of an object become its attributes, so those of an `argparse.Namespace` or a config can be read.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> 'StandIn':
        return self

    def __setstate__(self, state: Any) -> None:
        for attributes in state if isinstance(state, tuple) else (state,):  # a tuple: those of __dict__, of __slots__
            if isinstance(attributes, dict):
                vars(self).update({key: value for key, value in attributes.items() if isinstance(key, str)})

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, str):
            vars(self)[key] = value

    def append(self, value: Any) -> None:
        pass

    add = append


def stand_in_name(value: Any) -> str | None:
    """'module.Name' of the class or function that a stand-in replaces, None for other values."""
    kind = value if isinstance(value, type) else type(value)
    return kind.__name__ if issubclass(kind, StandIn) else None


def read_contents(path: Path, meta: bool = False) -> Contents:
    """Read a weight file of any format, recognised by its first bytes, not by its name.

    Args:
        path: File of safetensors or of `torch.save`, in its present (zip) or its legacy form.
        meta: Make all tensors on device 'meta'.

    Raises:
        OSError: It cannot be opened.
        UnreadableError: It is not a whole weight file, or not one that is read; one sentence says which.
    """
    with path.open('rb') as file:
        head = file.read(HEAD_BYTES)
        is_zip, is_safetensors = head.startswith(ZIP_START), head[8:9] == b'{'
        read = _read_zip if is_zip else _read_safetensors if is_safetensors else _read_legacy
        try:
            contents = read(path, file, meta)
            _check_tree(contents.tree)
        except _Refused as refused:
            raise UnreadableError(path, str(refused)) from refused
        except UNREADABLE as error:
            raise UnreadableError(path, _what_instead(head) or DAMAGED, ': get it again from where it came') from error
    return contents


class _Refused(Exception):
    """Why a file is not read though it may be whole, as a phrase that ends 'the file is ...'."""


def _what_instead(head: bytes) -> str:
    """What a file that starts with these bytes is instead of a weight file, '' if it may be one."""
    if head.removeprefix(b'\xef\xbb\xbf').lstrip().lower().startswith(WEB_PAGE_STARTS):
        return 'a web page, not a weight file'
    if head.startswith(GIT_LFS_START):
        return 'a pointer of Git LFS, not the weight file itself'
    return '' if head else 'empty'


class _Storage(NamedTuple):
    data: torch.UntypedStorage
    dtype: torch.dtype


class _Dict(dict):
    """An `OrderedDict` without its attributes."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Makes nothing but tensors, plain values and stand-ins.

    What `find_class` gives to a pickle cannot be changed by it: builtin types, bound methods, classes of its own.

    Args:
        file: Has the pickle.
        storage: Data of a storage, by its key and its size in bytes.
    """

    def __init__(self, file: Any, storage: Callable[[str, int], torch.UntypedStorage]) -> None:
        super().__init__(file, encoding='utf-8', errors='replace')  # of strings from Python 2
        self.storage = storage
        self.stand_ins: dict[str, type[StandIn]] = {}
        self.rebuilt: dict[str, Any] = {
            'torch._utils._rebuild_tensor': self.tensor,
            'torch._utils._rebuild_tensor_v2': self.tensor,
            'torch._utils._rebuild_tensor_v3': self.tensor_with_dtype,
            'torch._utils._rebuild_parameter': self.first,
            'torch._utils._rebuild_parameter_with_state': self.first,
            'torch._tensor._rebuild_from_type_v2': self.tensor_with_attributes,
            'torch.Size': tuple,
            'collections.OrderedDict': type('_Dict', (_Dict,), {}),
            'collections.defaultdict': self.empty_dict,
            'builtins.set': set,
            '__builtin__.set': set,  # up to protocol 2
            'builtins.frozenset': frozenset,
            '__builtin__.frozenset': frozenset,
        }

    def find_class(self, module: str, name: str) -> Any:
        name = f'{module}.{name}'
        if name in DTYPES:
            return DTYPES[name]
        if name in self.rebuilt:
            return self.rebuilt[name]
        if name not in self.stand_ins:
            self.stand_ins[name] = type(name, (StandIn,), {})
        return self.stand_ins[name]

    def persistent_load(self, found: Any) -> Any:
        """The storage or class that an id stands for."""
        if isinstance(found, tuple) and len(found) >= 4:
            tag, kind, key, _, *sizes = found
            dtype = STORAGES.get(stand_in_name(kind) or '')
            if tag == 'module' or tag == 'storage' and dtype is None:
                return kind  # the rest of a module is its source code, which legacy files hold
            if tag == 'storage' and dtype and type(key) is str and sizes and type(sizes[0]) is int and sizes[0] >= 0:
                return _Storage(self.storage(key, sizes[0] * dtype.itemsize), dtype)
        raise ValueError('refers to something outside that is not a storage')

    def globals(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.stand_ins).difference(STORAGES, TENSOR_TYPES)))

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
        return _tensor(storage, storage.dtype, offset, size, stride)

    def tensor_with_dtype(
            self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any,
    ) -> torch.Tensor:
        return _tensor(storage, dtype, offset, size, stride)

    def tensor_with_attributes(self, function: Any, kind: Any, args: Any, *_: Any) -> Any:
        return function(*args)  # something that find_class or a call of it gave

    def empty_dict(self, *_: Any) -> dict[Any, Any]:
        return {}

    def first(self, value: Any, *_: Any) -> Any:
        return value


def _tensor(storage: Any, dtype: Any, offset: Any, size: Any, stride: Any) -> torch.Tensor:
    if not isinstance(storage, _Storage):
        raise ValueError('a tensor without a storage')
    end = offset + 1 + sum((length - 1) * step for length, step in zip(size, stride)) if all(size) else 0
    if min((offset, *size, *stride)) < 0 or end * dtype.itemsize > storage.data.nbytes():
        raise ValueError('a tensor that is not within its storage')
    return torch.empty(0, dtype=dtype, device=storage.data.device).set_(storage.data, offset, size, stride)


def _read_safetensors(path: Path, _: BinaryIO, meta: bool) -> Contents:
    tree = {}
    with safe_open(str(path), framework='pt') as file:
        for key in file.keys():
            view = file.get_slice(key)
            if meta:
                dtype = (view[:0] if view.get_shape() else file.get_tensor(key)).dtype
                tree[key] = torch.empty(view.get_shape(), dtype=dtype, device='meta')
            else:
                tree[key] = file.get_tensor(key)
        return Contents('safetensors', tree, (), dict(file.metadata() or {}))


def _read_zip(path: Path, file: BinaryIO, meta: bool) -> Contents:
    with zipfile.ZipFile(file) as archive:
        roots = [name.removesuffix('data.pkl') for name in archive.namelist() if name.endswith('/data.pkl')]
        if len(roots) != 1:
            raise _Refused(f'a zip file with {len(roots)} entries */data.pkl, where torch.save writes one')

        def content(name: str) -> bytes:
            """An entry, whose checksum may be missing."""
            entry = archive.getinfo(roots[0] + name)
            if entry.file_size > MAX_PICKLE_BYTES:
                raise _Refused(f'not read: it holds more than {MAX_PICKLE_BYTES // 2 ** 20} MiB besides tensors')
            if entry.compress_type != zipfile.ZIP_STORED:
                return archive.read(entry)
            file.seek(_start(file, entry))
            return file.read(entry.file_size)

        if f'{roots[0]}byteorder' in archive.namelist() and content('byteorder').decode() != sys.byteorder:
            raise _Refused(f'not of a machine that is {sys.byteorder}-endian like this one')
        data = None if meta else _mapped(path)

        def storage(key: str, num_bytes: int) -> torch.UntypedStorage:
            entry = archive.getinfo(f'{roots[0]}data/{key}')
            if entry.file_size < num_bytes:
                raise ValueError('a storage is cut off')
            if data is None:
                return torch.UntypedStorage(num_bytes, device='meta')
            if entry.compress_type != zipfile.ZIP_STORED:
                return torch.frombuffer(bytearray(archive.read(entry)), dtype=torch.uint8).untyped_storage()
            start = _start(file, entry)
            return data[start:start + num_bytes]

        unpickler = _Unpickler(io.BytesIO(content('data.pkl')), storage)
        return Contents('zip pickle', unpickler.load(), unpickler.globals(), {})


def _start(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin: after its header, its name and its extra field."""
    file.seek(entry.header_offset + 26)
    return entry.header_offset + 30 + sum(struct.unpack('<HH', file.read(4)))


def _read_legacy(path: Path, file: BinaryIO, meta: bool) -> Contents:
    """Magic number, protocol, system, object, storage keys, each a pickle; then the storages, each after its size."""
    sizes: dict[str, int] = {}

    def on_meta(key: str, num_bytes: int) -> torch.UntypedStorage:
        sizes[key] = num_bytes
        return torch.UntypedStorage(num_bytes, device='meta')

    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:  # whatever length a string claims
        for expected in LEGACY_START:
            if _Unpickler(stream, on_meta).load() != expected:
                raise ValueError('not a file of torch.save')
        _Unpickler(stream, on_meta).load()
        start = stream.tell()
        unpickler = _Unpickler(stream, on_meta)
        tree = unpickler.load()
        starts = {}
        for key in _Unpickler(stream, on_meta).load():
            starts[key] = stream.tell() + 8  # after the number of values
            stream.seek(starts[key] + sizes[key])  # ValueError beyond the end
        if not meta:
            data = _mapped(path)

            def from_file(key: str, num_bytes: int) -> torch.UntypedStorage:
                found = data[starts[key]:starts[key] + num_bytes]
                return found if starts[key] % ALIGNMENT == 0 else found.clone()

            stream.seek(start)
            tree = _Unpickler(stream, from_file).load()
    return Contents('legacy pickle', tree, unpickler.globals(), {})


def _mapped(path: Path) -> torch.UntypedStorage:
    """A file as memory; what is written to it stays in memory."""
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).untyped_storage()


def _check_tree(tree: Any) -> None:
    """Make sure that dicts, lists and tuples can be walked by a few lines of recursion."""
    level, num_values = [tree], 0
    for _ in range(MAX_DEPTH):
        level = [node for node in level if isinstance(node, (dict, list, tuple))]
        num_values += sum(map(len, level))
        if num_values > MAX_VALUES:
            raise _Refused(f'not read: it holds more than {MAX_VALUES} values, counting the shared ones each time')
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
        if not level:
            return
    raise _Refused(f'not read: its dicts and lists are nested more than {MAX_DEPTH} levels deep')

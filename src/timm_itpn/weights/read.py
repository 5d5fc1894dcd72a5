"""Reads weight files of any format without running what is pickled in them.

Weights need nothing but tensors and plain containers. Those are rebuilt; an inert stand-in replaces every other class
and function that a pickle names, so a file with a numpy scalar, an `argparse.Namespace` or somebody's own class is read
too. The data of tensors is mapped into memory, and compared with its checksum where the file has one.
"""
import io
import mmap
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..checks import check_regular_file

MAX_DEPTH = 100  # of dicts and lists in one another, so that callers may recurse
MAX_VALUES = 4_000_000  # shared ones are counted each time, as a recursion meets them
MAX_VIEWS = 8  # tensors may share a storage, but each takes memory of its own when it is converted
SMALL_BYTES = 4_000_000  # of all tensors together, whatever they share
MAX_TENSORS = 50_000  # of a safetensors file, each of which takes a fraction of a millisecond
MAX_OPERATIONS = 4_000_000  # of a pickle; 10,000 tensors take 500,000
KEY_OPERATIONS = 400  # what a key counts for that may be slow to hash, or have the hash of others
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
ADVICE = ': get it again from where it came, or name another'

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
        ValueError: It is a folder, a pipe or a device.
        UnreadableError: It is not a whole weight file, or not one that is read; one sentence says which.
    """
    check_regular_file(path)
    with path.open('rb') as file:
        head = file.read(HEAD_BYTES)
        try:
            if head[8:9] == b'{':
                contents = _read_safetensors(path, meta)
            else:
                stream = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                data = None if meta else torch.frombuffer(stream, dtype=torch.uint8).untyped_storage()
                is_zip = head.startswith(ZIP_START)
                contents = _read_zip(file, stream, data) if is_zip else _read_legacy(stream, data)
            _check_tree(contents.tree)
        except _Refused as refused:
            raise UnreadableError(path, *refused.args) from refused
        except UNREADABLE as error:
            raise UnreadableError(path, _what_instead(head) or DAMAGED, ADVICE) from error
    return contents


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


class _Refused(Exception):
    """Why a file is not read, as a phrase that ends 'the file is ...', and what to do."""


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


class _Tensor(torch.Tensor):
    """A tensor while the pickle is read, which may not compute with it: a few bytes can be expanded to any size."""

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        raise ValueError('an operation on a tensor')


# where on the stack the keys are that an operation puts into a dict or a set
KEYS = {
    pickle.SETITEM[0]: slice(-2, -1), pickle.SETITEMS[0]: slice(None, None, 2), pickle.DICT[0]: slice(None, None, 2),
    pickle.ADDITEMS[0]: slice(None), pickle.FROZENSET[0]: slice(None)}
CALLS = pickle.REDUCE + pickle.NEWOBJ + pickle.NEWOBJ_EX + pickle.BUILD  # what is on top of the stack may be copied
EXTENSIONS = pickle.EXT1 + pickle.EXT2 + pickle.EXT4  # objects of this process


def _counted(code: int, run: Callable[[Any], None]) -> Callable[[Any], None]:
    """An operation of a pickle that is counted before it is done."""
    def counted(unpickler: Any) -> None:
        unpickler.count(1, unpickler.stack[KEYS.get(code, slice(0))])
        if code in CALLS:
            top = unpickler.stack[-1]
            values = (top, *top) if isinstance(top, tuple) else (top,)
            unpickler.count(sum(len(value) for value in values if isinstance(value, (dict, list, set, tuple))))
        run(unpickler)
    return counted


class _Unpickler(pickle._Unpickler):
    """Makes nothing but tensors, plain values and stand-ins, in a bounded number of operations.

    What `find_class` gives to a pickle cannot be changed by it: builtin types, bound methods, classes of its own. That
    of C cannot be bounded: it hashes keys of any depth, and takes as much memory as it is told to.

    Args:
        file: Has the pickle.
        storage: Data of a storage, by its key and its size in bytes.
    """

    def __init__(self, file: Any, storage: Callable[[str, int], torch.UntypedStorage]) -> None:
        super().__init__(file, encoding='utf-8', errors='replace')  # of strings from Python 2
        self.storage = storage
        self.storages: dict[str, torch.UntypedStorage] = {}
        self.num_operations = 0
        self.stand_ins: dict[str, type[StandIn]] = {}
        self.tensors: list[torch.Tensor] = []
        self.rebuilt: dict[str, Any] = {
            'torch._utils._rebuild_tensor': self.tensor,
            'torch._utils._rebuild_tensor_v2': self.tensor,
            'torch._utils._rebuild_tensor_v3': self.tensor,
            'torch._utils._rebuild_parameter': self.first,
            'torch._utils._rebuild_parameter_with_state': self.first,
            'torch._tensor._rebuild_from_type_v2': self.tensor_with_attributes,
            'torch.Size': self.first,
            'collections.OrderedDict': self.ordered_dict,
            'collections.defaultdict': self.empty_dict,
            'builtins.set': self.set,
            '__builtin__.set': self.set,  # up to protocol 2
            'builtins.frozenset': self.frozenset,
            '__builtin__.frozenset': self.frozenset,
        }

    def load(self) -> Any:
        tree = super().load()
        for tensor in self.tensors:
            tensor.__class__ = torch.Tensor
        stored = sum(storage.nbytes() for storage in self.storages.values())
        if sum(tensor.nbytes for tensor in self.tensors if not tensor.is_meta) > SMALL_BYTES + MAX_VIEWS * stored:
            raise _Refused(f'not read: its tensors are more than {MAX_VIEWS} times as large as what it stores')
        return tree

    def count(self, number: int, keys: Iterable[Any] = ()) -> None:
        """Count operations, and what it takes to hash keys and to compare them."""
        self.num_operations += number
        if self.num_operations > MAX_OPERATIONS:
            raise _Refused(f'not read: what is pickled in it takes more than {MAX_OPERATIONS} operations')
        for key in keys:
            if isinstance(key, (tuple, frozenset)):
                self.count(KEY_OPERATIONS, key)
            elif isinstance(key, int) and key.bit_length() > 64:  # many could have one hash
                raise ValueError('an integer that is too long for a key')

    def find_class(self, module: str, name: str) -> Any:
        name = f'{module}.{name}'
        if name in DTYPES:
            return DTYPES[name]
        if name in self.rebuilt:
            return self.rebuilt[name]
        if name not in self.stand_ins:
            self.count(20)  # a class is large
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
                num_bytes = sizes[0] * dtype.itemsize
                if key not in self.storages:
                    self.storages[key] = self.storage(key, num_bytes)
                if self.storages[key].nbytes() == num_bytes:
                    return _Storage(self.storages[key], dtype)
        raise ValueError('refers to something outside that is not a storage')

    def globals(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.stand_ins).difference(STORAGES, TENSOR_TYPES)))

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *others: Any) -> torch.Tensor:
        if not isinstance(storage, _Storage):
            raise ValueError('a tensor without a storage')
        self.count(len(size))
        dtype = next((value for value in others if isinstance(value, torch.dtype)), storage.dtype)
        end = offset + 1 + sum((length - 1) * step for length, step in zip(size, stride)) if all(size) else 0
        if min((offset, *size, *stride)) < 0 or end * dtype.itemsize > storage.data.nbytes():
            raise ValueError('a tensor that is not within its storage')
        tensor = torch.empty(0, dtype=dtype, device=storage.data.device).set_(storage.data, offset, size, stride)
        tensor.__class__ = _Tensor
        self.tensors.append(tensor)
        return tensor

    def tensor_with_attributes(self, function: Any, kind: Any, args: Any, *_: Any) -> Any:
        return function(*args)  # something that find_class or a call of it gave

    def ordered_dict(self, items: Any = ()) -> dict[Any, Any]:
        self.count(0, [key for key, _ in items])
        return _Dict(items)

    def set(self, items: Any) -> Any:
        self.count(0, items)
        return set(items)

    def frozenset(self, items: Any) -> Any:
        return frozenset(self.set(items))

    def empty_dict(self, *_: Any) -> dict[Any, Any]:
        return {}

    def first(self, value: Any, *_: Any) -> Any:
        return value

    dispatch = {code: _counted(code, run) for code, run in pickle._Unpickler.dispatch.items() if code not in EXTENSIONS}
    dispatch[pickle.BYTEARRAY8[0]] = dispatch[pickle.BINBYTES8[0]]  # takes no memory before it has the bytes


def _read_safetensors(path: Path, meta: bool) -> Contents:
    tree = {}
    with safe_open(str(path), framework='pt') as file:
        if len(keys := file.keys()) > MAX_TENSORS:
            raise _Refused(f'not read: it has more than {MAX_TENSORS} tensors')
        for key in keys:
            view = file.get_slice(key)
            if meta:
                dtype = (view[:0] if view.get_shape() else file.get_tensor(key)).dtype
                tree[key] = torch.empty(view.get_shape(), dtype=dtype, device='meta')
            else:
                tree[key] = file.get_tensor(key)
        return Contents('safetensors', tree, (), dict(file.metadata() or {}))


def _read_zip(file: BinaryIO, stream: mmap.mmap, data: torch.UntypedStorage | None) -> Contents:
    with zipfile.ZipFile(file) as archive:
        entries = [entry for entry in archive.infolist() if '/code/' not in entry.filename]  # not those of TorchScript
    roots = [entry.filename.removesuffix('data.pkl') for entry in entries if entry.filename.endswith('/data.pkl')]
    if len(roots) != 1:
        raise _Refused(f'a zip file with {len(roots)} entries */data.pkl, where torch.save writes one')
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise _Refused('not read: it is compressed, which torch.save never does; pack it again without (zip -0)')
    root, places = roots[0], {entry.filename: _place(stream, entry) for entry in entries}
    if len(places) < len(entries) or sum(entry.file_size for entry in entries) > len(stream):
        raise ValueError('entries that overlap')
    for entry in entries:
        checked = entry.CRC and (data or entry.filename == f'{root}data.pkl')  # 0: torch was told to write none
        if checked and zlib.crc32(memoryview(stream)[places[entry.filename]]) != entry.CRC:
            raise _Refused(f'{DAMAGED} (wrong checksum of {entry.filename})', ADVICE)
    if f'{root}byteorder' in places and stream[places[f'{root}byteorder']].decode() != sys.byteorder:
        raise _Refused(f'not of a machine that is {sys.byteorder}-endian like this one')

    def storage(key: str, num_bytes: int) -> torch.UntypedStorage:
        place = places[f'{root}data/{key}']
        if place.stop - place.start < num_bytes:
            raise ValueError('a storage is cut off')
        return _storage(data, place.start, num_bytes)

    unpickler = _Unpickler(io.BytesIO(stream[places[f'{root}data.pkl']]), storage)
    return Contents('zip pickle', unpickler.load(), unpickler.globals(), {})


def _place(stream: mmap.mmap, entry: zipfile.ZipInfo) -> slice:
    """Where the bytes of an entry are: after its header, its name and its extra field."""
    start = entry.header_offset + 30 + sum(struct.unpack_from('<HH', stream, entry.header_offset + 26))
    if entry.header_offset < 0 or start + entry.file_size > len(stream):
        raise ValueError('an entry that is not within the file')
    return slice(start, start + entry.file_size)


def _read_legacy(stream: mmap.mmap, data: torch.UntypedStorage | None) -> Contents:
    """Magic number, protocol, system, object, storage keys, each a pickle; then the storages, each after its size."""
    sizes: dict[str, int] = {}

    def on_meta(key: str, num_bytes: int) -> torch.UntypedStorage:
        sizes[key] = num_bytes
        return _storage(None, 0, num_bytes)

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
    if data:
        stream.seek(start)
        tree = _Unpickler(stream, lambda key, num_bytes: _storage(data, starts[key], num_bytes)).load()
    return Contents('legacy pickle', tree, unpickler.globals(), {})


def _storage(data: torch.UntypedStorage | None, start: int, num_bytes: int) -> torch.UntypedStorage:
    """A part of a file, mapped if its address suits every dtype; on device meta without data."""
    if data is None:
        return torch.UntypedStorage(num_bytes, device='meta')
    part = data[start:start + num_bytes]
    return part if start % ALIGNMENT == 0 else part.clone()


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

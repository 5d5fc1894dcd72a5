"""Runs a pickle on stand-ins, so that what it holds can be listed without any of its code being run.

A pickle is a program. `pickletools` splits it into operations, and the machine here runs them: it cannot import, reads
no attribute of what the pickle makes, and calls nothing but the functions in `MAKERS`. A subclass of
`pickle.Unpickler` would not do: extension codes can go past its `find_class`, and it calls methods of what it made.
"""
import math
import pickletools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ['DTYPES', 'Machine', 'Opaque', 'Refused', 'check_tree', 'meta_tensor']

MAX_STEPS = 4_000_000  # 10,000 tensors take 0.4 million; nothing but steps is through in seconds, in less than 2 GiB
MAX_DEPTH = 100  # so that a tree can be walked by recursion; also what ends one that holds itself
MAX_NAME = 500  # each stand-in has a copy
MAX_ARGS = 16  # those of a tensor; longer ones would be copied for each call
MAX_TENSOR_BYTES = 2 ** 60  # torch counts in signed 64 bits

DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
STORAGES = {
    'torch.DoubleStorage': torch.float64,
    'torch.FloatStorage': torch.float32,
    'torch.HalfStorage': torch.float16,
    'torch.BFloat16Storage': torch.bfloat16,
    'torch.LongStorage': torch.int64,
    'torch.IntStorage': torch.int32,
    'torch.ShortStorage': torch.int16,
    'torch.CharStorage': torch.int8,
    'torch.ByteStorage': torch.uint8,
    'torch.BoolStorage': torch.bool,
    'torch.ComplexDoubleStorage': torch.complex128,
    'torch.ComplexFloatStorage': torch.complex64,
    'torch.storage.UntypedStorage': torch.uint8,  # counted in bytes; the dtype is an argument of the tensor
}
TENSOR_TYPES = ('torch.Tensor', 'torch.nn.parameter.Parameter', 'torch.nn.parameter.Buffer')


@dataclass(frozen=True)
class Opaque:
    """Stand-in for a class, a function, or an object made by one.

    Attributes:
        name: 'module.Name' of the class or function.
    """
    name: str


@dataclass(frozen=True)
class _Storage(Opaque):
    dtype: torch.dtype


class Refused(Exception):
    """Why a file is not read though it may be whole, as the end of a sentence."""


class Machine:
    """Runs pickles.

    Attributes:
        globals: Names of the classes and functions asked for so far, all of them.
        storages: Key of each storage -> its size in bytes.
    """

    def __init__(self) -> None:
        self.globals: set[str] = set()
        self.storages: dict[str, int] = {}
        self.steps_left = MAX_STEPS

    def unusual_globals(self) -> tuple[str, ...]:
        """Sorted names of the globals besides those of which tensors, parameters and ordered dicts are made."""
        return tuple(sorted(self.globals.difference(MAKERS, STORAGES, DTYPES, TENSOR_TYPES)))

    def run(self, stream: Any) -> Any:
        """What the next pickle of a stream makes.

        Raises:
            Refused: It does what no weight file does.
            ValueError, LookupError, TypeError: It is no pickle; what exactly is raised is left to chance.
        """
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the marks
        self.memo: dict[int, Any] = {}
        for opcode, arg, _ in pickletools.genops(stream):
            self.steps_left -= 1
            if self.steps_left < 0:
                raise Refused(f'its pickle takes more than {MAX_STEPS} steps')
            if opcode.name == 'STOP':
                break
            if opcode.name in LITERALS:
                self.push(arg)
            elif opcode.name in OPERATIONS:
                OPERATIONS[opcode.name](self, arg)
            else:
                raise Refused(f'its pickle has the operation {opcode.name}, which torch.save does not write')
        return self.stack.pop()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop() if self.stack else self.pop_mark()

    def pop_last(self, num: int) -> list[Any]:
        return [self.stack.pop() for _ in range(num)][::-1]

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def find(self, name: str) -> Any:
        if len(name) > MAX_NAME or not name.isprintable():
            raise Refused('its pickle asks for a class or function by what is no name')
        self.globals.add(name)
        return DTYPES.get(name, Opaque(name))

    def call(self, function: Any, args: Any) -> Any:
        if not isinstance(function, Opaque) or not isinstance(args, (tuple, list)):
            raise ValueError('calls what is no function')
        if function.name not in MAKERS:
            return Opaque(function.name)
        return MAKERS[function.name](*args[:MAX_ARGS])

    def call_first(self, items: list[Any]) -> Any:
        return self.call(items[0], items[1:])

    def persistent(self, found: Any) -> Any:
        """The storage or class that an id stands for."""
        if isinstance(found, tuple) and 4 <= len(found) <= MAX_ARGS and isinstance(found[1], Opaque):
            tag, kind, key, _, *sizes = found
            if tag == 'module' or tag == 'storage' and kind.name not in STORAGES:
                return kind  # the rest of a module is its source code, which legacy files hold
            if tag == 'storage' and type(key) is str and sizes and type(sizes[0]) is int and sizes[0] >= 0:
                dtype = STORAGES[kind.name]
                self.storages[key] = sizes[0] * dtype.itemsize
                return _Storage(kind.name, dtype)
        raise Refused('its pickle refers to something outside that is no storage')

    def add(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(map(_key, items))
        elif not isinstance(target, Opaque):
            raise ValueError('adds to what is no list')

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(_paired(items))
        elif not isinstance(target, Opaque):
            raise ValueError('sets items of what is no dict')

    def memorize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]


LITERALS = set(
    'INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE '
    'SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8'.split())

OPERATIONS: dict[str, Callable[[Machine, Any], Any]] = {
    'PROTO': lambda m, _: None,
    'FRAME': lambda m, _: None,
    'MARK': lambda m, _: m.mark(),
    'POP': lambda m, _: m.pop(),
    'POP_MARK': lambda m, _: m.pop_mark(),
    'DUP': lambda m, _: m.push(m.stack[-1]),
    'PUT': lambda m, index: m.memorize(index),
    'BINPUT': lambda m, index: m.memorize(index),
    'LONG_BINPUT': lambda m, index: m.memorize(index),
    'MEMOIZE': lambda m, _: m.memorize(len(m.memo)),
    'GET': lambda m, index: m.push(m.memo[index]),
    'BINGET': lambda m, index: m.push(m.memo[index]),
    'LONG_BINGET': lambda m, index: m.push(m.memo[index]),
    'NONE': lambda m, _: m.push(None),
    'NEWTRUE': lambda m, _: m.push(True),
    'NEWFALSE': lambda m, _: m.push(False),
    'EMPTY_LIST': lambda m, _: m.push([]),
    'EMPTY_TUPLE': lambda m, _: m.push(()),
    'EMPTY_DICT': lambda m, _: m.push({}),
    'EMPTY_SET': lambda m, _: m.push(set()),
    'LIST': lambda m, _: m.push(m.pop_mark()),
    'TUPLE': lambda m, _: m.push(tuple(m.pop_mark())),
    'TUPLE1': lambda m, _: m.push(tuple(m.pop_last(1))),
    'TUPLE2': lambda m, _: m.push(tuple(m.pop_last(2))),
    'TUPLE3': lambda m, _: m.push(tuple(m.pop_last(3))),
    'DICT': lambda m, _: m.push(dict(_paired(m.pop_mark()))),
    'FROZENSET': lambda m, _: m.push(frozenset(map(_key, m.pop_mark()))),
    'APPEND': lambda m, _: m.add(m.pop_last(1)),
    'APPENDS': lambda m, _: m.add(m.pop_mark()),
    'ADDITEMS': lambda m, _: m.add(m.pop_mark()),
    'SETITEM': lambda m, _: m.set_items(m.pop_last(2)),
    'SETITEMS': lambda m, _: m.set_items(m.pop_mark()),
    'GLOBAL': lambda m, name: m.push(m.find(name.replace(' ', '.'))),
    'STACK_GLOBAL': lambda m, _: m.push(m.find('.'.join(m.pop_last(2)))),
    'INST': lambda m, name: m.push(m.call(m.find(name.replace(' ', '.')), m.pop_mark())),
    'OBJ': lambda m, _: m.push(m.call_first(m.pop_mark())),
    'REDUCE': lambda m, _: m.push(m.call(*m.pop_last(2))),
    'NEWOBJ': lambda m, _: m.push(m.call(*m.pop_last(2))),
    'NEWOBJ_EX': lambda m, _: m.push(m.call(*m.pop_last(3)[:2])),
    'BUILD': lambda m, _: m.pop_last(1).clear(),  # the state of an object, or an attribute of an ordered dict
    'PERSID': lambda m, name: m.push(m.persistent(name)),
    'BINPERSID': lambda m, _: m.push(m.persistent(m.pop_last(1)[0])),
}


def _key(value: Any, depth: int = 3) -> Any:
    """A value that can be hashed: the hash of deep tuples takes all of the stack, that of tangled ones all time."""
    plain = (str, int, float, bytes, type(None), torch.dtype, torch.Tensor, Opaque)
    if isinstance(value, (tuple, frozenset)) and depth and len(value) <= 32:
        for item in value:
            _key(item, depth - 1)
    elif not isinstance(value, plain):
        raise Refused(f'its pickle has a {type(value).__name__} as a key or in a set')
    return value


def _paired(items: list[Any]) -> Iterable[tuple[Any, Any]]:
    if len(items) % 2:
        raise ValueError('a key has no value')
    return zip(map(_key, items[::2]), items[1::2])


def meta_tensor(shape: tuple[int, ...], dtype: Any) -> torch.Tensor:
    """An empty tensor without memory.

    Raises:
        Refused: No tensor can have the shape.
    """
    good = isinstance(shape, tuple) and len(shape) <= 64 and isinstance(dtype, torch.dtype)
    if not good or not all(type(size) is int and 0 <= size < MAX_TENSOR_BYTES for size in shape):
        raise Refused('it has a tensor of impossible shape')
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize > MAX_TENSOR_BYTES:
        raise Refused('it has a tensor of impossible shape')
    return torch.empty(shape, dtype=dtype, device='meta')


def check_tree(tree: Any) -> None:
    """Make sure that a tree can be walked by a few lines of recursion.

    Raises:
        Refused: It is too deep, holds itself, or is too large because it holds the same parts over and over.
    """
    level, size = [tree], 0
    for _ in range(MAX_DEPTH):
        level = [node for node in level if isinstance(node, (dict, list, tuple))]
        size += sum(map(len, level))
        if size > MAX_STEPS:
            raise Refused(f'it holds more than {MAX_STEPS} values, counting the shared ones each time')
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
        if not level:
            return
    raise Refused(f'its dicts and lists hold one another more than {MAX_DEPTH} levels deep')


def _rebuilt(storage: Any, offset: Any, size: Any, *_: Any) -> Any:
    if isinstance(storage, _Storage):
        return meta_tensor(size, storage.dtype)
    raise ValueError('a tensor without a storage')


def _rebuilt_v3(storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any) -> Any:
    return meta_tensor(size, dtype)


def _first(value: Any, *_: Any) -> Any:
    return value


def _from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """A tensor that has attributes of its own, or of a subclass."""
    if not isinstance(function, Opaque) or not isinstance(kind, Opaque) or not isinstance(args, tuple):
        raise ValueError('a tensor made by what is no function')
    if function.name not in TENSOR_MAKERS:
        return Opaque(kind.name)
    return TENSOR_MAKERS[function.name](*args[:MAX_ARGS])


TENSOR_MAKERS: dict[str, Callable[..., Any]] = {
    'torch._utils._rebuild_tensor': _rebuilt,
    'torch._utils._rebuild_tensor_v2': _rebuilt,
    'torch._utils._rebuild_tensor_v3': _rebuilt_v3,
    'torch._utils._rebuild_parameter': _first,
    'torch._utils._rebuild_parameter_with_state': _first,
}
MAKERS: dict[str, Callable[..., Any]] = {
    **TENSOR_MAKERS,
    'torch._tensor._rebuild_from_type_v2': _from_type,
    'torch.Size': _first,
    'collections.OrderedDict': lambda: {},  # its items come after
}

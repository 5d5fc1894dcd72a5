"""What is in a weight file: true for good files, one sentence for broken ones, and nothing is run by hostile ones."""
import argparse
import collections
import dataclasses
import functools
import io
import os
import pathlib
import pickle
import random
import re
import struct
import sys
import tarfile
import time
import types
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from support.pickles import FORMATS, both_formats, save, write_pickle

from timm_itpn.weights import read
from timm_itpn.weights.read import read_contents, stand_in_name, why_no_weight_file
from timm_itpn.weights.sources import sha256_of


def assert_same(found, expected, meta=False):
    """The trees have the same keys and values."""
    if isinstance(expected, torch.Tensor):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.device.type == 'meta' if meta else torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert isinstance(found, dict) and list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key], meta)
    elif isinstance(expected, (list, tuple)):
        assert isinstance(expected, type(found)) and len(found) == len(expected)
        for one, other in zip(found, expected):
            assert_same(one, other, meta)
    else:
        assert found == expected


def trained():
    """A small model after a step of training, with all that scripts save."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return {
        'model': model.state_dict(),
        'optimizer': optimizer.state_dict(),
        'rng_state': torch.get_rng_state(),
        'python_rng_state': random.getstate(),
        'epoch': 3,
        'best': 81.5,
        'done': False,
    }


@dataclasses.dataclass
class Holder:
    tree: dict


class Config(dict):
    """As those of yacs: items, and attributes beside them."""

    def __init__(self, **items):
        super().__init__(items)
        self.frozen = True


class Slots:
    __slots__ = ('value',)

    def __init__(self):
        self.value = 1


# good files

@both_formats
@pytest.mark.parametrize('meta', [False, True])
def test_checkpoint_of_training_agrees_with_torch_load(meta, file_format, tmp_path):
    path = save(trained(), tmp_path / 'w.pt', file_format)
    found = read_contents(path, meta)
    assert found.format == file_format and found.globals == () and found.metadata == {}
    assert_same(found.tree, torch.load(path, weights_only=True), meta)
    assert_same(dataclasses.asdict(Holder(found.tree))['tree'], found.tree, meta)  # as timm does


@both_formats
@pytest.mark.parametrize('dtype', [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16], ids=str)
def test_dtypes_are_kept(dtype, file_format, tmp_path):
    weights = {'a': torch.arange(6.).view(2, 3).to(dtype), 'scalar': torch.ones(()).to(dtype)}
    found = read_contents(save(weights, tmp_path / 'w.pt', file_format)).tree
    for key, value in weights.items():
        assert found[key].dtype == dtype
        assert torch.equal(found[key].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8))


@both_formats
@pytest.mark.parametrize('meta', [False, True])
def test_views_and_parameters_have_their_own_shape(meta, file_format, tmp_path):
    whole = torch.arange(24.).view(4, 6)
    named = torch.nn.Parameter(torch.ones(5))
    named.no_decay = True  # attributes are saved in a way of their own
    weights = collections.OrderedDict(
        whole=whole, columns=whole[:, ::2], turned=whole.T, row=whole[1], expanded=torch.ones(1).expand(7),
        empty=torch.zeros(0, 3), parameter=torch.nn.Parameter(torch.ones(2, 2).half()), named=named,
        list=[whole, (whole, 1)])
    found = read_contents(save(weights, tmp_path / 'w.pt', file_format), meta)
    assert_same(found.tree, dict(weights), meta)
    assert found.globals == ()


@both_formats
def test_tensors_can_be_changed_and_the_file_stays(file_format, tmp_path):
    path = save({'a': torch.ones(3)}, tmp_path / 'w.pt', file_format)
    read_contents(path).tree['a'].zero_()
    assert torch.equal(read_contents(path).tree['a'], torch.ones(3))


@both_formats
@pytest.mark.parametrize('protocol', range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_everything_but_tensors_and_plain_values_is_named(protocol, file_format, tmp_path):
    content = {
        'weight': torch.ones(2, 3),
        'plain': {3: None, (1, 'a'): True, 'size': torch.Size([1, 2]), 2.5: [2 ** 80, -1, 'ä' * 300], 'set': {1, 2}},
        'dtype': torch.float16,
        'default': collections.defaultdict(list, a=[1]),
        'args': argparse.Namespace(gp='avg', append=1, path=pathlib.PurePosixPath('x')),
        'config': Config(lr=1e-4, model=Config(name='x')),
        'slots': Slots(),
        'accuracy': np.float32(81.5),
        'array': np.ones(3),
        'queue': collections.deque([1, torch.ones(2)]),
        'module': torch.nn.Linear(2, 2),
        'sparse': torch.eye(2).to_sparse(),
        'function': os.getcwd,
    }
    path = tmp_path / 'w.pt'
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=FORMATS[file_format])
    found = read_contents(path)
    tree = found.tree
    assert list(tree) == list(content)
    assert_same({key: tree[key] for key in list(tree)[:4]}, {key: content[key] for key in list(tree)[:4]})
    assert all(stand_in_name(tree[key]) for key in list(tree)[4:])
    assert stand_in_name(tree['args']) == 'argparse.Namespace' and vars(tree['args'])['append'] == 1
    assert (tree['args'].gp, tree['config'].model.name, tree['config'].frozen, tree['slots'].value) == (
        'avg', 'x', True, 1)
    names = {'argparse.Namespace', f'{__name__}.Config', 'torch.nn.modules.linear.Linear', f'{os.name}.getcwd'}
    assert names <= set(found.globals) and list(found.globals) == sorted(found.globals)
    assert 'torch.FloatStorage' not in found.globals


@pytest.mark.parametrize('meta', [False, True])
def test_safetensors_agrees_with_its_own_reader(meta, tmp_path):
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    weights = {str(dtype): torch.ones(2, 3).to(dtype) for dtype in dtypes}
    weights.update(scalar=torch.tensor(1.0), empty=torch.zeros(0, 3))
    path = tmp_path / 'w.pt'  # recognised by what is in it
    safetensors.torch.save_file(weights, path, metadata={'format': 'pt', 'tag': 'ä'})
    found = read_contents(path, meta)
    assert (found.format, found.globals, found.metadata) == ('safetensors', (), {'format': 'pt', 'tag': 'ä'})
    assert_same({key: found.tree[key] for key in weights}, weights, meta)
    assert len(found.tree) == len(weights)


def test_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        save({'a': torch.arange(1000.)}, tmp_path / 'w.pt')
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_contents(tmp_path / 'w.pt').tree, {'a': torch.arange(1000.)})


# broken files

BROKEN = {
    'text': b'Permission denied: too many downloads of this file.\n',
    'json': b'{"error": "not found"}',
    'plain pickle': pickle.dumps({'a': 1}),
    'random': random.Random(0).randbytes(5000),
    'zip signature': b'PK\x03\x04' + bytes(100),
    'safetensors signature': struct.pack('<Q', 10 ** 9) + b'{"weight": ',
    'pickle of a call that is none': b'\x80\x02K\x01)R.',
    'tensor of no storage': b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR.',
    'length of 2 ** 60': b'\x80\x05\x96' + struct.pack('<Q', 2 ** 60) + b'.',
    'one byte': b'P',
}


@pytest.mark.parametrize('name', list(BROKEN))
def test_file_of_something_else_is_said(name, tmp_path):
    path = tmp_path / 'w.pt'
    path.write_bytes(BROKEN[name])
    with pytest.raises(ValueError) as error:
        read_contents(path)
    assert str(error.value) == (
        f'{path} ({len(BROKEN[name])} bytes) is truncated, damaged or not a weight file: get it again from where it '
        'came, or name another.')


@pytest.mark.parametrize('content, reason', [
    (b'', 'is empty'),
    (b'\n<!DOCTYPE html><title>Google Drive - Virus scan warning</title>', 'is a web page, not a weight file'),
    (b'\xef\xbb\xbf<HTML lang="en">', 'is a web page, not a weight file'),
    (b'version https://git-lfs.github.com/spec/v1\noid ', 'is a pointer of Git LFS, not the weight file itself'),
])
def test_what_came_instead_is_said(content, reason, tmp_path):
    path = tmp_path / 'w.safetensors'
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_contents(path)
    assert str(error.value).startswith(f'{path} ({len(content)} bytes) {reason}: get it again from where it came')


SAVERS = {
    **{name: functools.partial(save, file_format=name) for name in FORMATS},
    'safetensors': lambda content, path: safetensors.torch.save_file(content, path, {'format': 'pt'})}


@pytest.mark.parametrize('kind', SAVERS)
def test_whole_files_are_told_from_truncated_ones(kind, tmp_path):
    path = tmp_path / 'w.pt'
    SAVERS[kind]({}, path)
    assert why_no_weight_file(path) == ''
    SAVERS[kind]({'a': torch.arange(3000.), 'c': torch.ones(7, dtype=torch.bfloat16)}, path)
    assert why_no_weight_file(path) == ''
    whole = path.read_bytes()
    for size in [len(whole) * tenth // 10 for tenth in range(1, 10)] + [9, 30, len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert why_no_weight_file(path) == 'truncated, damaged or not a weight file'
    with pytest.raises(FileNotFoundError):
        why_no_weight_file(tmp_path / 'absent.pt')


def test_damaged_safetensors_are_read_or_refused(tmp_path):
    noise = random.Random(0)
    whole = safetensors.torch.save({'a': torch.arange(300.), 'c': torch.ones(7)}, {'format': 'pt'})
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(noise.choice((1, 2, 5))):
            damaged[noise.randrange(300)] = noise.choice((0, 255, noise.randrange(256)))  # the header
        (tmp_path / 'w.pt').write_bytes(damaged)
        assert isinstance(why_no_weight_file(tmp_path / 'w.pt'), str)  # an answer, not an exception


@both_formats
def test_damaged_files_are_read_or_refused(file_format, tmp_path):
    noise = random.Random(0)
    path = save(trained(), tmp_path / 'w.pt', file_format)
    whole = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(noise.randint(1, 8)):
            damaged[noise.randrange(len(damaged))] = noise.randrange(256)
        path.write_bytes(damaged)
        for meta in (False, True):
            try:
                read_contents(path, meta)
            except ValueError as error:
                assert str(path) in str(error)  # any other error fails


@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir])
def test_only_regular_files_are_opened(make, tmp_path):
    make(tmp_path / 'w.pt')  # to open a pipe is to wait for a writer
    for read_file in (read_contents, sha256_of):
        with pytest.raises(ValueError, match='w.pt is (a folder|not a regular file): name a file'):
            read_file(tmp_path / 'w.pt')


def test_no_flipped_bit_of_a_zip_changes_what_is_read(tmp_path):
    noise = random.Random(0)
    path = save(trained(), tmp_path / 'w.pt')
    whole, expected = path.read_bytes(), torch.load(path, weights_only=True)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[noise.randrange(len(damaged))] ^= 1 << noise.randrange(8)
        path.write_bytes(damaged)
        try:
            found = read_contents(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:  # it was in the padding, or in a field that nobody reads
            assert_same(found.tree, expected)


# hostile files

class Trap:
    """Notes whatever is done to it, its class or its instances."""
    sprung = []

    def __new__(cls, *args, **kwargs):
        cls.spring()
        return super().__new__(cls)

    @classmethod
    def spring(cls, *args):
        cls.sprung.append(args)
        return cls

    def __hash__(self):
        return len(self.spring().sprung)

    as_subclass = __setstate__ = append = extend = add = update = __setitem__ = __call__ = spring


@pytest.fixture
def trap(monkeypatch):
    module = types.ModuleType('trap')
    module.Trap, module.instance, module.spring, module.nested = Trap, Trap(), Trap.spring, Trap
    monkeypatch.setitem(sys.modules, 'trap', module)
    Trap.sprung.clear()
    return Trap.sprung


HOSTILE = {
    'reduce': b'\x80\x02ctrap\nspring\n)R.',
    'reduce of stack global': b'\x80\x04\x8c\x04trap\x8c\x06spring\x93)R.',
    'dotted name': b'\x80\x04\x8c\x04trap\x8c\x0dnested.spring\x93)R.',
    'newobj': b'\x80\x02ctrap\nTrap\n)\x81.',
    'newobj_ex': b'\x80\x04ctrap\nTrap\n)}\x92.',
    'build of a dict': b'\x80\x02ctrap\nTrap\n)\x81}X\x01\x00\x00\x00aK\x01sb.',
    'build of a tuple': b'\x80\x02ctrap\nTrap\n)\x81N}\x86b.',
    'inst': b'(I1\nitrap\nTrap\n.',
    'obj': b'(ctrap\nTrap\nI1\no.',
    'append': b'ctrap\nTrap\n(tRI1\na.',
    'appends': b'\x80\x02ctrap\nTrap\n)\x81(K\x01K\x02e.',
    'additems': b'\x80\x04ctrap\nTrap\n)\x81(K\x01\x90.',
    'setitem': b'ctrap\nTrap\n(tRI1\nI2\ns.',
    'setitems': b'\x80\x02ctrap\nTrap\n)\x81(K\x01K\x02u.',
    'hash of a key': b'}ctrap\nTrap\n(tRI1\ns.',
    'reduce after it was dropped': b'\x80\x02ctrap\nspring\n)R0N.',
    'call of what a call gave': b'\x80\x02ctrap\nspring\n)R)R.',
    'class as a callable method': b'\x80\x02ctrap\nTrap\n)\x81}X\x06\x00\x00\x00appendctrap\nspring\nsbK\x01a.',
    'tensor of a subclass': (
        b'\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(ctrap\nspring\nctrap\nTrap\n)}tR.'),
}


@both_formats
@pytest.mark.parametrize('name', list(HOSTILE))
def test_hostile_pickle_runs_nothing(name, file_format, trap, tmp_path):
    pickle.loads(HOSTILE[name])
    assert trap  # so it is hostile
    trap.clear()
    found = read_contents(write_pickle(HOSTILE[name], tmp_path / 'w.pt', file_format))
    assert not trap
    assert any(asked_for.startswith('trap.') for asked_for in found.globals)


@pytest.mark.parametrize('target', [
    'torch._utils._rebuild_tensor_v2', 'collections.OrderedDict', 'torch.Size', 'builtins.set', 'builtins.frozenset',
    'trap.Trap', 'torch.storage.UntypedStorage', 'torch.float16'])
def test_pickle_cannot_change_what_rebuilds_tensors(target, tmp_path):
    """By the operation BUILD, which sets attributes."""
    module, _, name = target.rpartition('.')
    for state in (({'append': 1, 'tensor': 1}), (None, {'__defaults__': (1, 2), '__new__': 1, 'dtype': 1, 'fill': 1})):
        pickled = f'\x80\x02c{module}\n{name}\n'.encode('latin1') + pickle.dumps(state, 2)[2:-1] + b'b.'
        try:
            read_contents(write_pickle(pickled, tmp_path / 'bad.pt'))
        except ValueError:
            pass
        assert_same(read_contents(save(trained(), tmp_path / 'w.pt')).tree, torch.load(tmp_path / 'w.pt'))


@both_formats
@pytest.mark.parametrize('pickled', [
    b'\x80\x02ctrap\nspring\n)RQ.',
    b'\x80\x02U\x07storagectrap\nspring\n)R\x86Q.',
    b'\x80\x02(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuJ\xff\xff\xff\xfftQ.',
    b'\x80\x02(U\x07storagectorch\nFloatStorage\n]U\x03cpuK\x01tQ.',
    b'\x80\x02}Q.',
    b'Pstorage\n.',
], ids=['object', 'short', 'negative', 'list as key', 'dict', 'text'])
def test_hostile_persistent_ids_are_refused(pickled, file_format, trap, tmp_path):
    with pytest.raises(ValueError, match='is truncated, damaged or not a weight file'):
        read_contents(write_pickle(pickled, tmp_path / 'w.pt', file_format))
    assert not trap


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('tree', [
    {'a': torch.zeros(1).expand(2 ** 15, 2 ** 15)},
    dict(zip('abcdefghij', torch.zeros(1, 2 ** 20).expand(10, -1).unbind())),
], ids=['expanded', 'shared'])
def test_tensors_that_would_take_far_more_memory_than_the_file_are_refused(tree, legacy, tmp_path):
    torch.save(tree, tmp_path / 'w.pt', _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match='its tensors are more than 8 times as large as what it stores'):
        read_contents(tmp_path / 'w.pt')


@pytest.mark.parametrize('meta', [False, True])
@pytest.mark.parametrize('offset, size, stride', [
    (0, (9,), (1,)), (6, (4,), (1,)), (-1, (2,), (1,)), (0, (-1, 2), (1, 1)), (2 ** 62, (1,), (1,)),
    (0, (2,), (2 ** 62,)), (0, (2,), (-1,)), (0, (2 ** 62, 2 ** 62), (0, 0)), (0, (2 ** 200,), (1,)),
    (0, (1.5,), (1,)), (0, (True,), (1,)), (0, 'a', 'a'), (0, None, None), (0, (2, 2), (1,)), (0, (2,), (1, 1)),
], ids=str)
def test_tensors_that_reach_out_of_their_storage_are_refused(offset, size, stride, meta, tmp_path):
    def tensor(*args):
        storage = b'(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x08tQ'
        return b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(' + storage + b''.join(
            pickle.dumps(arg, 2)[2:-1] for arg in args) + b'\x89}tR.'

    for name, args in (('good', (0, (2, 4), (4, 1))), ('bad', (offset, size, stride))):
        with zipfile.ZipFile(tmp_path / name, 'w') as archive:
            archive.writestr('w/data.pkl', tensor(*args))
            archive.writestr('w/data/0', bytes(32))
    assert read_contents(tmp_path / 'good', meta).tree.shape == (2, 4)
    with pytest.raises(ValueError, match='is truncated, damaged or not a weight file'):
        read_contents(tmp_path / 'bad', meta)


EXPANDED = (  # 99,999 values, of one in the file
    b'ctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x08tQ'
    b'K\x00J\x9f\x86\x01\x00\x85K\x00\x85\x89}tR')


@pytest.mark.parametrize(('pickled', 'refused'), [
    (EXPANDED, False), (b'}' + EXPANDED + b'Ns', False), (EXPANDED + b'(' + EXPANDED + b'\x90', True),
    (EXPANDED + b'NK\x01s', True), (EXPANDED + b'(NK\x01u', True), (EXPANDED + b'(' + EXPANDED + b'K\x00))tb', True),
    (b'cbuiltins\nset\n' + EXPANDED + b'\x85R', True), (b'ccollections\nOrderedDict\n' + EXPANDED + b'\x85\x85R', True),
    (b'cx\ny\n' + EXPANDED + b'R', True), (b'cx\ny\n' + EXPANDED + b'\x81', True),
    (EXPANDED.replace(b'\x85K\x00\x85', b'\x85' + EXPANDED), True),
], ids=['value', 'key', 'add', 'set item', 'set items', 'build', 'set', 'pair', 'arguments', 'new', 'size'])
def test_pickle_may_hold_tensors_and_not_compute_with_them(pickled, refused, tmp_path):
    with zipfile.ZipFile(tmp_path / 'w.pt', 'w') as archive:
        archive.writestr('w/data.pkl', b'\x80\x04' + pickled + b'.')
        archive.writestr('w/data/0', bytes(32))
    if not refused:
        tree = read_contents(tmp_path / 'w.pt').tree
        assert type(tree if isinstance(tree, torch.Tensor) else next(iter(tree))) is torch.Tensor
        return
    with pytest.raises(ValueError, match='is truncated, damaged or not a weight file') as error:
        read_contents(tmp_path / 'w.pt')
    assert 'an operation on a tensor' in str(error.value.__cause__)


def holding_itself():
    knot = []
    knot.append([{'again': knot}])
    return knot


def shared(depth):
    value = [1] * 10
    for _ in range(depth):
        value = [value] * 10
    return value


@pytest.mark.parametrize('pickled, reason', [
    (pickle.dumps(holding_itself(), 2), r'its dicts and lists are nested more than \d+ levels deep'),
    (b'\x80\x02' + b']' * 100_000 + b'a' * 99_999 + b'.', r'its dicts and lists are nested more than \d+ levels'),
    (b'\x80\x02N' + b'\x85' * 100_000 + b'.', r'its dicts and lists are nested more than \d+ levels deep'),
    (pickle.dumps(shared(30), 2), r'it holds more than \d+ values'),
], ids=['holds itself', 'deep lists', 'deep tuples', 'shared'])
def test_tangled_pickles_are_refused(pickled, reason, tmp_path):
    with pytest.raises(ValueError, match=f'w.pt .* is not read: {reason}'):
        read_contents(write_pickle(pickled, tmp_path / 'w.pt'))


REUSED = b'q\x000'  # kept for later by the number 0
LIST = b'(' + b''.join(b'M' + struct.pack('<H', i) for i in range(2 ** 16)) + b'l' + REUSED
BOMBS = {
    'tuple of 2 ** 60 tuples as key': b'\x80\x02}N' + b'2\x86' * 60 + b'Ns.',
    'large tuple as many keys': b'\x80\x02N' + b'2\x86' * 12 + REUSED + b'}' + b'h\x00Ns' * 2000 + b'.',
    'deep tuple as key': b'\x80\x02}N' + b'\x85' * 100_000 + b'Ns.',
    'integers of one hash': b'\x80\x02}(' + b''.join(
        b'\x8a\x0c' + ((2 ** 61 - 1) * i).to_bytes(12, 'little') + b'N' for i in range(2 ** 20, 2 ** 20 + 999)) + b'u.',
    'long integer as many keys': b'\x80\x02\x8b' + struct.pack('<I', 10 ** 6) + b'\x7f' * 10 ** 6 + REUSED + (
        b'}' + b'h\x00Ns' * 10_000 + b'.'),
    'copies of a list': b'\x80\x02' + LIST + b'cbuiltins\nset\nh\x00\x85R' * 10_000 + b'.',
    'copies of arguments': b'\x80\x02' + LIST.replace(b'l' + REUSED, b't' + REUSED) + b'cx\ny\nh\x00R' * 10_000 + b'.',
    'memory for a string that is not there': b'\x80\x05\x96' + struct.pack('<Q', 2 ** 36) + b'.',
    'sets': b'\x80\x04(' + b'\x8f' * 500_000 + b'l.',
}


@both_formats
@pytest.mark.parametrize('name', list(BOMBS))
def test_pickles_that_take_time_or_memory_are_refused(name, file_format, tmp_path, monkeypatch):
    monkeypatch.setattr(read, 'MAX_OPERATIONS', 400_000)
    write_pickle(BOMBS[name], tmp_path / 'w.pt', file_format)
    start = time.monotonic()
    with pytest.raises(ValueError, match='is truncated, damaged or not|takes more than 400000 operations'):
        read_contents(tmp_path / 'w.pt', meta=True)
    assert time.monotonic() - start < 20


def test_more_tensors_than_any_model_has_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(read, 'MAX_TENSORS', 9)
    for num, refused in ((9, False), (10, True)):
        safetensors.torch.save_file({str(i): torch.zeros(0) for i in range(num)}, tmp_path / 'w.safetensors')
        if refused:
            with pytest.raises(ValueError, match='is not read: it has more than 9 tensors'):
                read_contents(tmp_path / 'w.safetensors')
        else:
            assert len(read_contents(tmp_path / 'w.safetensors', meta=True).tree) == num


def test_memory_is_not_reserved_for_a_far_place_in_the_memo(tmp_path):
    pickled = b'\x80\x02Nr\xff\xff\xff\xffj\xff\xff\xff\xff.'
    assert read_contents(write_pickle(pickled, tmp_path / 'w.pt')).tree is None


def entries(archive):
    """Headers in the central directory of a file of torch.save."""
    content = bytearray(archive)
    starts = [match.start() for match in re.finditer(b'PK\x01\x02', archive)]
    return content, starts


@pytest.mark.parametrize('field, value, most', [
    (20, 2 ** 31, 'Q'), (24, 2 ** 31, 'I'), (42, 2 ** 30, 'I'), (42, 0, 'I'), (10, 8, 'H'), (16, 1, 'I'),
], ids=['packed size', 'size', 'place beyond the end', 'place of another', 'compression', 'checksum'])
def test_entries_that_are_not_what_the_directory_says_are_refused(field, value, most, tmp_path):
    path = save({'a': torch.arange(50.), 'b': torch.arange(9.)}, tmp_path / 'w.pt')
    content, starts = entries(path.read_bytes())
    for start in starts[1:]:
        changed = bytearray(content)
        struct.pack_into(f'<{most}', changed, start + field, value)
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r'w.pt \(\d+ bytes\) is '):
            read_contents(path)


def test_entries_of_one_name_are_refused(tmp_path):
    path = save({'a': torch.arange(9.)}, tmp_path / 'w.pt')
    with zipfile.ZipFile(path, 'a') as archive, pytest.warns(UserWarning, match='Duplicate name'):
        archive.writestr('w/data/0', torch.ones(9).numpy().tobytes())
    with pytest.raises(ValueError, match='is truncated, damaged or not a weight file'):
        read_contents(path)


def test_compressed_zip_is_refused_and_can_be_packed_anew(tmp_path):
    """It may unpack to anything; torch never writes one."""
    weights = {'a': torch.arange(1000.), 'b': torch.arange(3)}
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):  # the second one is that of `zip -0`
        with zipfile.ZipFile(save(weights, tmp_path / 'w.pt')) as old:
            with zipfile.ZipFile(tmp_path / 'packed.pt', 'w', compression) as new:
                for name in old.namelist():
                    new.writestr(name, old.read(name))
        if compression == zipfile.ZIP_STORED:
            assert_same(read_contents(tmp_path / 'packed.pt').tree, weights)
        else:
            with pytest.raises(ValueError, match=r'is not read: it is compressed, .* pack it again without \(zip -0\)'):
                read_contents(tmp_path / 'packed.pt')


@pytest.mark.parametrize('names', [(), ('data.pkl',), ('archive/data.pkl', 'other/data.pkl')])
def test_zip_without_one_pickle_is_refused(names, tmp_path):
    with zipfile.ZipFile(tmp_path / 'w.pt', 'w') as archive:
        for name in ('archive/version', *names):
            archive.writestr(name, pickle.dumps({}))
    with pytest.raises(ValueError, match=r'is a zip file with [02] entries \*/data.pkl'):
        read_contents(tmp_path / 'w.pt')


@pytest.mark.filterwarnings('ignore:`torch.jit:FutureWarning')
def test_scripted_models_and_tar_files_are_not_run(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / 'scripted.pt')
    name = stand_in_name(read_contents(tmp_path / 'scripted.pt').tree)
    assert name.startswith('__torch__.torch.nn.modules.linear.') and name.endswith('Linear')  # it may be mangled
    with tarfile.open(tmp_path / 'w.tar', 'w') as archive:  # as torch.save wrote in 2016
        for name in ('sys_info', 'pickle', 'storages', 'tensors'):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(ValueError, match='is truncated, damaged or not a weight file'):
        read_contents(tmp_path / 'w.tar')

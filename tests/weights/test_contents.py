"""What is in a weight file: true for good files, one sentence for broken ones. Hostile ones: test_inert_pickle.py."""
import argparse
import collections
import io
import os
import pathlib
import pickle
import random
import struct
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from support.pickles import FORMATS, both_formats, save, write_pickle

from timm_itpn.weights import contents
from timm_itpn.weights.contents import Opaque, read_contents


def assert_same(found, expected):
    """The trees have the same keys and values, tensors the same shape and dtype."""
    if isinstance(expected, torch.Tensor):
        assert found.device.type == 'meta'
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    elif isinstance(expected, dict):
        assert type(found) is dict and list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert isinstance(expected, type(found)) and len(found) == len(expected)
        for one, other in zip(found, expected):
            assert_same(one, other)
    else:
        assert found == expected


def trained():
    """A small model after a step of training, with all that scripts save."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    return {
        'model': model.state_dict(),
        'optimizer': optimizer.state_dict(),
        'lr_scheduler': scheduler.state_dict(),
        'scaler': torch.amp.GradScaler('cpu').state_dict(),
        'rng_state': torch.get_rng_state(),
        'python_rng_state': random.getstate(),
        'epoch': 3,
        'best': 81.5,
        'done': False,
    }


class Slots:
    __slots__ = ('value',)

    def __init__(self):
        self.value = torch.ones(2)


class Stateful:
    def __getstate__(self):
        return [torch.ones(2), 'state']

    def __setstate__(self, state):
        raise AssertionError('state set')


# good files

@both_formats
def test_checkpoint_of_training_agrees_with_torch_load(file_format, tmp_path):
    path = save(trained(), tmp_path / 'w.pt', file_format)
    found = read_contents(path)
    assert found.format == file_format and found.globals == () and found.metadata == {}
    assert_same(found.tree, torch.load(path, map_location='meta', weights_only=True))


@both_formats
@pytest.mark.parametrize('dtype', [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_dtypes_are_kept(dtype, file_format, tmp_path):
    weights = {'a': torch.zeros(2, 3).to(dtype), 'scalar': torch.zeros(()).to(dtype)}
    assert_same(read_contents(save(weights, tmp_path / 'w.pt', file_format)).tree, weights)


@both_formats
def test_views_and_parameters_have_their_own_shape(file_format, tmp_path):
    whole = torch.zeros(4, 6)
    named = torch.nn.Parameter(torch.zeros(5))
    named.no_decay = True  # attributes are saved in a way of their own
    weights = collections.OrderedDict(
        whole=whole, columns=whole[:, ::2], turned=whole.T, row=whole[1], expanded=torch.zeros(1).expand(7),
        empty=torch.zeros(0, 3), parameter=torch.nn.Parameter(torch.zeros(2, 2).half()), named=named,
        list=[whole, (whole, 1)])
    found = read_contents(save(weights, tmp_path / 'w.pt', file_format))
    assert_same(found.tree, dict(weights))
    assert found.globals == ()


@both_formats
def test_single_tensor_is_a_tree(file_format, tmp_path):
    assert_same(read_contents(save(torch.ones(3), tmp_path / 'w.pt', file_format)).tree, torch.ones(3))


@both_formats
def test_other_objects_are_opaque_and_named(file_format, tmp_path):
    objects = {
        'args': argparse.Namespace(lr=1e-4, path=pathlib.PurePosixPath('x')),
        'accuracy': np.float32(81.5),
        'array': np.ones(3),
        'counts': collections.Counter('aab'),
        'queue': collections.deque([1, torch.ones(2)]),
        'default': collections.defaultdict(list, a=[1]),
        'optimizer': torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]),
        'module': torch.nn.Linear(2, 2),
        'device': torch.device('cpu'),
        'sparse': torch.eye(2).to_sparse(),
        'function': os.getcwd,
    }
    found = read_contents(save(objects, tmp_path / 'w.pt', file_format))
    assert list(found.tree) == list(objects)
    assert all(type(value) is Opaque for value in found.tree.values())
    assert found.tree['args'] == Opaque('argparse.Namespace')
    assert found.tree['module'] == Opaque('torch.nn.modules.linear.Linear')
    names = {'argparse.Namespace', 'pathlib.PurePosixPath', 'numpy.ndarray', 'collections.Counter', 'torch.device'}
    assert names <= {name.replace('pathlib._local', 'pathlib') for name in found.globals}  # its name in Python 3.13
    assert list(found.globals) == sorted(found.globals) and 'torch.FloatStorage' not in found.globals


@pytest.mark.parametrize('protocol', range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_read(protocol, tmp_path):
    content = {
        'weight': torch.ones(2, 3), 'size': torch.Size([1, 2]), 'dtype': torch.float16, 3: None, (1, 'a'): True,
        2.5: [2 ** 80, -1, 300, 70000], 'text': 'ä' * 300, 'nested': ([], {}, ()), 'slots': Slots(), 'odd': Stateful()}
    content['again'] = content['nested']
    path = tmp_path / 'w.pt'
    torch.save(content, path, pickle_protocol=protocol)
    found = read_contents(path).tree
    assert type(found.pop('slots')) is type(found.pop('odd')) is Opaque
    del content['slots'], content['odd']
    content['size'] = (1, 2)
    assert_same(found, content)


@pytest.mark.parametrize('protocol', [0, 1, 4, 5])
def test_plain_values_of_every_protocol_are_kept(protocol, tmp_path):
    plain = {'a': [1, 2.5, None, True, 'x\n', 2 ** 70], (1, 2): (1, 2, 3, 4), 'empty': [(), [], {}], 7: (1,)}
    if protocol >= 4:
        plain.update(sets=[{1, 2}, frozenset('a')], bytes=b'ab')
    assert read_contents(write_pickle(pickle.dumps(plain, protocol), tmp_path / 'w.pt')).tree == plain


@pytest.mark.parametrize('pickled', [
    b'N(NN1.', b'NN0.', b'((NNl(N(dtt.', b'(I1\nI2\nd.', b'Np7\n0g7\n.', b'\x80\x02NN\x86q\x050h\x05.',
    b'\x80\x04N\x940h\x00.', b'\x80\x02](K\x01K\x02e2\x86.', b'\x80\x04\x8f(K\x01K\x02\x90.', b'(N((00t.'])
def test_rare_operations_do_as_in_pickle(pickled, tmp_path):
    assert read_contents(write_pickle(pickled, tmp_path / 'w.pt')).tree == pickle.loads(pickled)


def test_safetensors_agrees_with_its_own_reader(tmp_path):
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
              torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    weights = {str(dtype): torch.zeros(2, 3).to(dtype) for dtype in dtypes}
    weights.update(scalar=torch.tensor(1.0), empty=torch.zeros(0, 3))
    path = tmp_path / 'w.pt'  # recognised by what is in it
    safetensors.torch.save_file(weights, path, metadata={'format': 'pt', 'tag': 'ä'})
    found = read_contents(path)
    assert found.format == 'safetensors' and found.globals == ()
    assert found.metadata == {'format': 'pt', 'tag': 'ä'}
    assert_same({key: found.tree[key] for key in weights}, weights)
    assert len(found.tree) == len(weights)


def test_safetensors_with_unknown_dtype_is_refused(tmp_path, monkeypatch):
    safetensors.torch.save_file({'weight': torch.zeros(2)}, tmp_path / 'w.safetensors')
    monkeypatch.delitem(contents.SAFETENSORS_DTYPES, 'F32')
    with pytest.raises(ValueError, match='was not read: the dtype F32 of weight is not known to torch'):
        read_contents(tmp_path / 'w.safetensors')


@both_formats
def test_data_of_tensors_is_not_read(file_format, tmp_path, monkeypatch):
    path = save({'weight': torch.zeros(2 ** 22), 'bias': torch.zeros(2 ** 20)}, tmp_path / 'w.pt', file_format)
    num_read = 0

    class Counting(io.FileIO):
        def readinto(self, buffer):
            nonlocal num_read
            num_bytes = super().readinto(buffer)
            num_read += num_bytes
            return num_bytes

        def readall(self):  # the end of a zip file
            nonlocal num_read
            found = super().readall()
            num_read += len(found)
            return found

    monkeypatch.setattr(pathlib.Path, 'open', lambda path, mode: io.BufferedReader(Counting(path, mode)))
    assert read_contents(path).tree['weight'].shape == (2 ** 22,)
    assert 0 < num_read < 2 ** 20 < path.stat().st_size // 10


# broken files

BROKEN = {
    'text': b'Permission denied: too many downloads of this file.\n',
    'json': b'{"error": "not found"}',
    'plain pickle': pickle.dumps({'a': 1}),
    'random': random.Random(0).randbytes(5000),
    'zip signature': b'PK\x03\x04' + bytes(100),
    'safetensors signature': struct.pack('<Q', 10 ** 9) + b'{"weight": ',
    'pickle of a call that is none': b'\x80\x02K\x01)R.',
    'no stack': b'\x80\x02R.',
    'tensor of no storage': b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR.',
    'one byte': b'P',
}


@pytest.mark.parametrize('name', list(BROKEN))
def test_file_of_something_else_is_said(name, tmp_path):
    path = tmp_path / 'w.pt'
    path.write_bytes(BROKEN[name])
    with pytest.raises(ValueError) as error:
        read_contents(path)
    size = len(BROKEN[name])
    assert str(error.value) == (
        f'{path} ({size} bytes) is truncated or no weight file: delete it and fetch it again.')


@pytest.mark.parametrize('content, reason', [
    (b'', 'is empty'),
    (b'\n<!DOCTYPE html><title>Google Drive - Virus scan warning</title>', 'is a web page, not a weight file'),
    (b'\xef\xbb\xbf<html lang="en">', 'is a web page, not a weight file'),
    (b'version https://git-lfs.github.com/spec/v1\noid ', 'is a note of Git LFS, not the weight file itself'),
])
def test_what_came_instead_is_said(content, reason, tmp_path):
    path = tmp_path / 'w.safetensors'
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_contents(path)
    assert str(error.value) == f'{path} ({len(content)} bytes) {reason}: delete it and fetch it again.'


def test_missing_path_and_folder_are_said(tmp_path):
    with pytest.raises(ValueError, match='nothing.pt does not exist.$'):
        read_contents(tmp_path / 'nothing.pt')
    with pytest.raises(ValueError, match=f'{tmp_path} is a folder, not a weight file.$'):
        read_contents(tmp_path)
    (tmp_path / 'file').write_bytes(b'')
    with pytest.raises(ValueError, match='cannot be read: Not a directory.$'):
        read_contents(tmp_path / 'file' / 'w.pt')


@pytest.mark.parametrize('file_format', [*FORMATS, 'safetensors'])
def test_every_truncation_is_said(file_format, tmp_path):
    path, weights = tmp_path / 'w', {'weight': torch.zeros(20, 30), 'bias': torch.zeros(20)}
    if file_format == 'safetensors':
        safetensors.torch.save_file(weights, path)
    else:
        save({'model': weights, 'epoch': 3}, path, file_format)
    whole = path.read_bytes()
    assert read_contents(path).format == file_format
    for size in [*range(1, len(whole), 29), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf'w \({size} bytes\) is truncated or no weight file: delete it and'):
            read_contents(path)


@both_formats
def test_damaged_files_are_read_or_refused(file_format, tmp_path):
    noise = random.Random(0)
    path = save(trained(), tmp_path / 'w.pt', file_format)
    with zipfile.ZipFile(path) if FORMATS[file_format] else open(path, 'rb') as file:
        pickled = file.read('w/data.pkl') if FORMATS[file_format] else file.read()
    for _ in range(200):
        damaged = bytearray(pickled)
        for _ in range(noise.randint(1, 8)):
            damaged[noise.randrange(len(damaged))] = noise.randrange(256)
        if FORMATS[file_format]:
            write_pickle(bytes(damaged), path)
        else:
            path.write_bytes(damaged)
        try:
            read_contents(path)
        except ValueError as error:
            assert str(path) in str(error)  # any other error fails

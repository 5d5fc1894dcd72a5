"""Hostile pickles: read on stand-ins, they run nothing, and what no weight file does is refused."""
import copyreg
import os
import pickle
import struct
import sys
import types
import zipfile

import pytest
import torch
from support.pickles import FORMATS, both_formats, save, write_pickle

from timm_itpn.weights import contents, inert_pickle
from timm_itpn.weights.contents import Opaque, read_contents


class Directory:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@both_formats
def test_code_in_a_file_is_named_and_not_run(file_format, tmp_path):
    marker = tmp_path / 'marker'
    trap = Directory(marker)
    content = {'model': {'weight': torch.ones(2)}, 'trap': trap, 'nested': [(trap,)]}
    path = save(content, tmp_path / 'w.pt', file_format)
    found = read_contents(path)
    name = f'{os.mkdir.__module__}.mkdir'
    assert not marker.exists()
    assert found.globals == (name,) and found.tree['nested'] == [(Opaque(name),)]
    torch.load(path, weights_only=False)  # to show that the code is there and would run
    assert marker.exists()  # so it is hostile


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
    'reduce': (b'\x80\x02ctrap\nspring\n)R.', 'trap.spring'),
    'reduce of stack global': (b'\x80\x04\x8c\x04trap\x8c\x06spring\x93)R.', 'trap.spring'),
    'dotted name': (b'\x80\x04\x8c\x04trap\x8c\x0dnested.spring\x93)R.', 'trap.nested.spring'),
    'newobj': (b'\x80\x02ctrap\nTrap\n)\x81.', 'trap.Trap'),
    'newobj_ex': (b'\x80\x04ctrap\nTrap\n)}\x92.', 'trap.Trap'),
    'build of a dict': (b'\x80\x02ctrap\ninstance\n}X\x01\x00\x00\x00aK\x01sb.', 'trap.instance'),
    'build of a tuple': (b'\x80\x02ctrap\ninstance\nN}\x86b.', 'trap.instance'),
    'inst': (b'(I1\nitrap\nTrap\n.', 'trap.Trap'),
    'obj': (b'(ctrap\nTrap\nI1\no.', 'trap.Trap'),
    'append': (b'ctrap\ninstance\nI1\na.', 'trap.instance'),
    'appends': (b'\x80\x02ctrap\ninstance\n(K\x01e.', 'trap.instance'),
    'additems': (b'\x80\x04ctrap\ninstance\n(K\x01\x90.', 'trap.instance'),
    'setitem': (b'ctrap\ninstance\nI1\nI2\ns.', 'trap.instance'),
    'setitems': (b'\x80\x02ctrap\ninstance\n(K\x01K\x02u.', 'trap.instance'),
    'hash of a key': (b'}ctrap\ninstance\nI1\ns.', 'trap.instance'),
    'reduce after it was dropped': (b'\x80\x02ctrap\nspring\n)R0N.', 'trap.spring'),
    'reduce in a key': (b'}(ctrap\nspring\n)RI1\nu.', 'trap.spring'),
    'tensor of a subclass': (
        b'\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(ctrap\nspring\nctrap\nTrap\n)}tR.', 'trap.spring'),
}


@both_formats
@pytest.mark.parametrize('name', list(HOSTILE))
def test_hostile_pickle_runs_nothing(name, file_format, trap, tmp_path):
    pickled, asked_for = HOSTILE[name]
    pickle.loads(pickled)
    assert trap  # so it is hostile
    trap.clear()
    found = read_contents(write_pickle(pickled, tmp_path / 'w.pt', file_format))
    assert not trap
    assert asked_for in found.globals


@both_formats
def test_hostile_modules_are_not_imported(file_format, tmp_path, monkeypatch):
    (tmp_path / 'hostile_module.py').write_text('raise AssertionError("imported")')
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write_pickle(b'\x80\x02chostile_module.inner\nname\n.', tmp_path / 'w.pt', file_format)
    assert read_contents(path).tree == Opaque('hostile_module.inner.name')
    assert 'hostile_module' not in sys.modules


@pytest.mark.parametrize('opcode', [b'\x82\x7b', b'\x83\x7b\x00', b'\x84\x7b\x00\x00\x00'])
def test_extension_codes_are_refused(opcode, trap, tmp_path):
    copyreg.add_extension('trap', 'spring', 0x7b)
    try:
        pickle.loads(b'\x80\x02' + opcode + b')R.')
        assert trap
        trap.clear()
        with pytest.raises(ValueError, match='w.pt .* was not read: its pickle has the operation EXT[124], which'):
            read_contents(write_pickle(b'\x80\x02' + opcode + b')R.', tmp_path / 'w.pt'))
    finally:
        copyreg.remove_extension('trap', 'spring', 0x7b)
    assert not trap


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
    with pytest.raises(ValueError, match='was not read: its pickle refers to something outside that is no storage'):
        read_contents(write_pickle(pickled, tmp_path / 'w.pt', file_format))
    assert not trap


def tensor_pickle(shape):
    """A pickle of a tensor, of a float32 storage of one value."""
    storage = b'(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x01tQ'
    shape = pickle.dumps(shape, 2)[2:-1]
    return b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(' + storage + b'K\x00' + shape + b')\x89}tR.'


@pytest.mark.parametrize('shape', [
    (-1, 2), (2 ** 62, 2 ** 62), (2 ** 200,), (0, 2 ** 62, 2 ** 62), (1.5,), (True,), ('a',), [2, 3], None, (1,) * 1000,
], ids=str)
def test_impossible_shapes_are_refused(shape, tmp_path):
    assert read_contents(write_pickle(tensor_pickle((1, 1)), tmp_path / 'good.pt')).tree.shape == (1, 1)
    with pytest.raises(ValueError, match='w.pt .* was not read: it has a tensor of impossible shape'):
        read_contents(write_pickle(tensor_pickle(shape), tmp_path / 'w.pt'))


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
    (pickle.dumps(holding_itself(), 2), r'its dicts and lists hold one another more than \d+ levels deep'),
    (b'\x80\x02' + b']' * 100_000 + b'a' * 99_999 + b'.', r'its dicts and lists hold .* more than \d+ levels deep'),
    (b'\x80\x02N' + b'\x85' * 100_000 + b'.', r'its dicts and lists hold one another more than \d+ levels deep'),
    (pickle.dumps(shared(30), 2), r'it holds more than \d+ values'),
    (b'\x80\x02}N' + b'\x85' * 100_000 + b'Ns.', 'its pickle has a tuple as a key'),
    (b'\x80\x02}]Ns.', 'its pickle has a list as a key'),
    (b'\x80\x05\x97.', 'its pickle has the operation NEXT_BUFFER'),
], ids=['holds itself', 'deep lists', 'deep tuples', 'shared', 'deep key', 'list as key', 'buffer'])
def test_tangled_pickles_are_refused(pickled, reason, tmp_path):
    with pytest.raises(ValueError, match=f'w.pt .* was not read: {reason}'):
        read_contents(write_pickle(pickled, tmp_path / 'w.pt'))


@pytest.mark.parametrize('name', ['x' * 1000, 'a\nb', '\x1b[2J'])
def test_names_that_are_none_are_refused(name, tmp_path):
    pickled = b'\x80\x04' + pickle.dumps(name, 2)[2:-1] + b'\x8c\x01b\x93.'
    with pytest.raises(ValueError, match='was not read: its pickle asks for a class or function by what is no name'):
        read_contents(write_pickle(pickled, tmp_path / 'w.pt'))


def test_endless_pickle_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(inert_pickle, 'MAX_STEPS', 1000)
    with pytest.raises(ValueError, match='was not read: its pickle takes more than 1000 steps'):
        read_contents(write_pickle(b'N0' * 1000 + b'N.', tmp_path / 'w.pt'))


@pytest.mark.parametrize('compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@both_formats
def test_huge_pickle_is_refused(file_format, compression, tmp_path, monkeypatch):
    monkeypatch.setattr(contents, 'MAX_PICKLE_BYTES', 2 ** 20)
    path = write_pickle(pickle.dumps('x' * 2 ** 20), tmp_path / 'w.pt', file_format, compression=compression)
    with pytest.raises(ValueError, match='was not read: what it holds besides the data of tensors is more than 1 MiB'):
        read_contents(path)


def test_length_that_lies_reserves_no_memory(tmp_path):
    for pickled in (b'\x80\x05\x96' + struct.pack('<Q', 2 ** 60) + b'.', b'\x80\x04r\xff\xff\xff\xff.'):
        for file_format in FORMATS:
            with pytest.raises(ValueError, match='is truncated or no weight file'):
                read_contents(write_pickle(pickled, tmp_path / 'w.pt', file_format))


def test_packed_pickle_is_read_as_torch_does(tmp_path):
    path = write_pickle(pickle.dumps({'a': 1}), tmp_path / 'w.pt', compression=zipfile.ZIP_DEFLATED)
    assert read_contents(path).tree == {'a': 1}
    with pytest.raises(ValueError, match='was not read: its data.pkl is packed in a way that torch cannot unpack'):
        read_contents(write_pickle(pickle.dumps({}), tmp_path / 'w.pt', compression=zipfile.ZIP_BZIP2))


@pytest.mark.parametrize('names', [(), ('data.pkl',), ('archive/data.pkl', 'archive/DATA.PKL'), ('a/b/data.pkl',)])
def test_zip_without_one_pickle_is_refused(names, tmp_path):
    with zipfile.ZipFile(tmp_path / 'w.pt', 'w') as archive:
        for name in ('archive/version', *names):
            archive.writestr(name, pickle.dumps({}))
    with pytest.raises(ValueError, match=r'was not read: it is a zip file with [02] entries \*/data.pkl'):
        read_contents(tmp_path / 'w.pt')

"""Every command, given every kind of thing that it cannot use: one line on stderr, exit status, nothing written."""
import os
import signal

import pytest
import timm
import torch
from PIL import Image
from support.detect_runs import write_splits

from timm_itpn.cli import main

pytestmark = pytest.mark.usefixtures('one_thread', 'small_models')

BENCH = ('bench', '--model', 'fast_itpn_tiny', '--size', '32', '--batch', '1', '--repeats', '3')
SHOW = ('show', 'photo.png', '--model', 'fast_itpn_tiny', '--img-size', '32')
PRETRAIN = (
    'pretrain', '--data-dir', 'photos', '--model', 'fast_itpn_tiny', '--model-kwargs', 'embed_dim=64', 'depths=(1,1,1)',
    'num_heads=2', '--img-size', '32', '-b', '2', '--device', 'cpu', '--objective', 'pixel', '--output', 'new')

DETECT = ('detect', '--data-dir', 'coco', '--model-kwargs', 'embed_dim=64', 'depths=(1,1,1)', 'num_heads=2',
          '--device', 'cpu', '--output', 'new')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Files of every kind, to be named."""
    folder = tmp_path_factory.mktemp('files')
    torch.save(
        {'state_dict': timm.create_model('fast_itpn_tiny', num_classes=3, img_size=32, embed_dim=64, depths=(1, 1, 1),
                                         num_heads=2).state_dict(),
         'args': {'model': 'fast_itpn_tiny', 'model_kwargs': dict(embed_dim=64, depths=(1, 1, 1), num_heads=2)}},
        folder / 'w.pt')
    Image.new('RGB', (32, 32)).save(folder / 'photo.png')
    (folder / 'empty').write_bytes(b'')
    (folder / 'junk').write_bytes(bytes(range(256)) * 8)
    (folder / 'text').write_text('a: b: c\n{')
    (folder / 'cut').write_bytes((folder / 'w.pt').read_bytes()[:3000])
    (folder / 'secret').write_text('epochs: 1')
    (folder / 'images').mkdir()  # with none in it
    write_splits(folder / 'coco')
    (folder / 'photos').mkdir()
    for name in 'ab':
        Image.new('RGB', (32, 32)).save(folder / 'photos' / f'{name}.png')
    os.mkfifo(folder / 'pipe')
    (folder / 'link').symlink_to('nothing')
    return folder


@pytest.fixture
def refused(files, monkeypatch, capsys):
    """Run a command line that must be refused; return what it says."""
    monkeypatch.chdir(files)
    signal.signal(signal.SIGALRM, hangs)
    monkeypatch.setattr('io.open', deny(open))
    monkeypatch.setattr('builtins.open', deny(open))

    def run(argv):
        before = sorted(path.relative_to(files) for path in files.rglob('*'))
        signal.alarm(30)  # a pipe is waited for for ever
        try:
            status = main(argv)
        except SystemExit as stop:
            status = stop.code
        signal.alarm(0)
        assert sorted(path.relative_to(files) for path in files.rglob('*')) == before
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if not line.endswith(': building')]  # progress
        assert status in (1, 2) and captured.out == '' and len(lines) == 1, captured.err
        assert lines[0].startswith('timm-itpn') and len(lines[0]) < 1000, lines[0]
        for advice in ('remove', 'delete', 'Traceback', '.py, line', '.;', '..;'):
            assert advice not in lines[0]
        return lines[0]
    return run


def hangs(*_):
    raise GeneratorExit('it hangs')  # no command catches this


def deny(function):
    """`open` as for a user who may not read the file `secret`; the tests may run as root."""
    def opened(file, *args, **kwargs):
        if str(file).endswith('secret'):
            raise PermissionError(13, 'Permission denied', str(file))
        return function(file, *args, **kwargs)
    return opened


READERS = {
    'inspect': ('inspect', 'FILE'),
    'convert': ('convert', 'FILE', '-o', 'new'),
    'convert --reverse': ('convert', 'FILE', '-o', 'new', '--reverse'),
    'convert --class-map': ('convert', 'w.pt', '-o', 'new', '--class-map', 'FILE'),
    'show': ('show', 'FILE', '--output', 'new.png'),
    'show --checkpoint': (*SHOW, '--checkpoint', 'FILE'),
    'bench --against': (*BENCH, '--against', 'FILE:build'),
    'bench --record': (*BENCH, '--record', 'FILE'),
    'pretrain -c': (*PRETRAIN, '-c', 'FILE'),
    'pretrain --data-dir': (*PRETRAIN, '--data-dir', 'FILE'),
    'pretrain --resume': (*PRETRAIN, '--resume', 'FILE'),
    'detect -c': (*DETECT, '-c', 'FILE'),
    'detect --data-dir': (*DETECT, '--data-dir', 'FILE'),
    'detect --resume': (*DETECT, '--resume', 'FILE'),
    'detect --evaluate': (*DETECT, '--evaluate', 'FILE'),
    'detect --pretrained-path': (*DETECT, '--pretrained-path', 'FILE'),
}
KINDS = ('absent', 'absent/file', 'junk/file', 'empty', 'junk', 'text', 'cut', 'images', 'pipe', 'secret', '')

SOME_KINDS = {
    'bench --record': KINDS[1:3] + KINDS[4:],  # a new or an empty file is written to
    'pretrain -c': KINDS[:3] + KINDS[4:],  # an empty file has no settings
    'pretrain --data-dir': ('absent', 'junk', 'pipe', 'images'),  # slow, as the next
    'pretrain --resume': ('absent', 'empty', 'cut', 'pipe'),
    'detect -c': KINDS[:3] + KINDS[4:],
    'detect --data-dir': ('absent', 'junk', 'pipe', 'images'),
    'detect --resume': ('absent', 'cut'),
    'detect --evaluate': ('absent', 'empty', 'cut', 'w.pt', 'pipe'),
    'detect --pretrained-path': ('absent', 'cut')}


@pytest.mark.parametrize('reader', READERS)
def test_file_that_cannot_be_used_is_named(reader, refused):
    for kind in SOME_KINDS.get(reader, KINDS):
        said = refused([kind if arg == 'FILE' else arg.replace('FILE:', f'{kind}:') for arg in READERS[reader]])
        assert kind in said, said


WRITERS = {
    'convert': ('convert', 'w.pt', '-o', 'OUT'),
    'convert --reverse': ('convert', 'w.pt', '--reverse', '-o', 'OUT'),
    'demo': ('demo', '--output', 'OUT'),
    'show': (*SHOW, '--output', 'OUT'),
    'pretrain': (*PRETRAIN[:-1], 'OUT'),
    'detect': (*DETECT[:-1], 'OUT'),
    'bench --plot': (*BENCH, '--plot', 'OUT'),
    'bench --record': (*BENCH, '--record', 'OUT'),
    'evidence --record': ('evidence', 'pretraining', '--record', 'OUT'),
    'evidence --plot': ('evidence', '--measured', '--plot', 'OUT'),
}


@pytest.mark.parametrize('writer', WRITERS)
def test_output_that_cannot_be_written_is_named(writer, refused, files):
    kinds = ['pipe', 'junk/file.png', 'x' * 300 + '.png']
    kinds += [] if writer in ('pretrain', 'detect') else ['images']  # a folder may be there
    kinds += [] if writer.endswith('--record') else ['link']  # a file takes the place of a link to nothing
    kinds += ['new/file.png'] if writer.endswith(('--plot', '--record', 'show')) else []  # others make the folder
    for kind in kinds:
        assert kind in refused([arg.replace('OUT', kind) for arg in WRITERS[writer]])


COMMANDS = {
    'demo': ('demo', '--output', 'new'),
    'convert': ('convert', 'w.pt', '-o', 'new'),
    'convert --reverse': ('convert', 'w.pt', '-o', 'new', '--reverse'),
    'show': SHOW,
    'bench': BENCH,
    'evidence': ('evidence', 'pretraining'),
    'evidence all': ('evidence',),
    'bench --suite': ('bench', '--suite', 'cpu'),
    'inspect': ('inspect', 'w.pt'),
    'pretrain': PRETRAIN,
    'detect': DETECT,
    'list': ('list',),
    'recipe': ('recipe',),
}
MODELS = ('nosuch', 'resnet50', 'itpn_base.nosuch', '', '../x', 'hf-hub:x/y', 'fast_itpn\x1b')
ARGUMENTS = {  # (command, option): what it cannot be
    ('demo', '--epochs'): ('0', '-1', 'many', '1.5'),
    ('demo', '--batch-size'): ('0', '-1', '5000', 'nan'),
    ('demo', '--lr'): ('-1', 'x'),
    ('demo', '--img-size'): ('0', '-16', '20', '8', 'big'),
    ('demo', '--seed'): ('-1', str(2 ** 65)),
    ('demo', '--device'): ('xpu', 'meta', 'abacus', '', 'cpu:x'),
    ('demo', '--model'): MODELS,
    ('convert', '--model'): MODELS,
    ('convert', '--dtype'): ('int8',),
    ('convert', '--prefix'): ('nosuch',),
    ('convert', '--img-size'): ('0', '-32', '33', '1 2 3', 'x', str(10 ** 20)),
    ('convert', '--crop-pct'): ('0', '-1', 'nan', '1e9'),
    ('convert', '--mean'): ('nan', '1 2', 'x'),
    ('convert', '--std'): ('0', '-1', 'inf', '1 2'),
    ('convert', '--interpolation'): ('random', ''),
    ('convert', '--crop-mode'): ('other',),
    ('convert', '--ema'): (),
    ('convert --reverse', '--model'): ('fast_itpn_tiny',),
    ('convert --reverse', '--mean'): ('0',),
    ('show', '--model'): MODELS,
    ('show', '--img-size'): ('0', '-16', '20', '1 2 3', 'x'),
    ('show', '--device'): ('xpu', 'meta', 'abacus'),
    ('show', '--acceleration'): ('more',),
    ('show', '--gather-window'): ('-1',),
    ('show', '--seed'): ('-1', str(2 ** 65)),
    ('show', '--tokens'): (),
    ('bench', '--model'): MODELS,
    ('bench', '--size'): ('0', '-16', '100', 'big', '32x', '1e3'),
    ('bench', '--batch'): ('0', '-1', 'x'),
    ('bench', '--dtype'): ('int8',),
    ('bench', '--mode'): ('fast',),
    ('bench', '--templates'): ('-1', '0', 'x'),
    ('bench', '--repeats'): ('0', '2', '-1', 'x'),
    ('bench', '--warmup'): ('0', '-1'),
    ('bench', '--threads'): ('0', '-1', str(10 ** 6), str(10 ** 20)),
    ('bench', '--acceleration'): ('more',),
    ('bench', '--compile'): ('more',),
    ('bench', '--peers'): ('nosuch', 'resnet9x'),
    ('bench', '--against'): ('x', ':build', 'x.py:'),
    ('bench', '--suite'): ('cpu', 'tpu'),
    ('bench', '--objective'): ('clip', 'nosuch'),
    ('bench', '--plot'): ('x.jpg',),
    ('evidence', '--seeds'): ('-1', 'x', str(10 ** 20)),
    ('evidence', 'x'): (),
    ('evidence all', '--seeds'): ('0',),  # without the name of one
    ('bench --suite', '--repeats'): ('0',),
    ('bench --suite', '--peers'): ('x',),
    ('inspect', '--model'): MODELS,
    ('list', 'nosuch*'): (),
    ('recipe', '../x'): (),
    ('pretrain', '--model'): MODELS,
    ('pretrain', '--device'): ('xpu', 'abacus'),
    ('pretrain', '--workers'): ('-1', str(10 ** 11)),
    ('pretrain', '--clip-grad'): ('-1', 'nan', 'inf', 'x'),
    ('pretrain', '--model-ema-decay'): ('-1', '2'),
    ('pretrain', '--opt-betas'): ('-1', '0.9 2'),
    ('detect', '--model'): MODELS,
    ('detect', '--device'): ('xpu', 'abacus'),
    ('detect', '--short-sides'): ('0', 'x', ''),
    ('detect', '--head-norm'): ('layer',),
    ('detect', '--head-dim'): ('0', '-1'),
    ('detect', '--weight-decay'): ('-1', 'nan'),
    ('detect', '--recovery-interval'): ('-1', '1.5'),
    ('detect', '--train-split'): ('nosuch',),
}


@pytest.mark.parametrize(('command', 'option'), ARGUMENTS, ids=' '.join)
def test_argument_that_cannot_be_is_one_line(command, option, refused):
    for value in ARGUMENTS[command, option] or [None]:
        refused([*COMMANDS[command], option, *([] if value is None else value.split() or [''])])


@pytest.mark.parametrize('argv', [(), ('fly',), *((command[0], '--nosuch') for command in COMMANDS.values())])
def test_command_line_that_cannot_be_read_is_one_line(argv, refused):
    assert '--help' in refused(list(argv))

"""`timm-itpn convert` as a command: what it prints, how it exits, and what is left when it is interrupted."""
import json
import os
import signal

import pytest
import timm
import torch
from support.small import num_in_pyramid, official_weights

from timm_itpn.cli import main
from timm_itpn.tools import convert as conversion
from timm_itpn.weights.sources import sha256_of

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def pretraining(tmp_path_factory, small_models):
    path = tmp_path_factory.mktemp('official') / 'w.pt'
    weights = {key: value.half() for key, value in official_weights(num_classes=0, pyramid=True).items()}
    torch.save({'model': weights, 'model_ema': weights, 'epoch': 3}, path)
    return path


def convert(*args):
    return main(['convert', *map(str, args)])


def test_path_goes_to_stdout_and_what_was_seen_to_stderr(pretraining, tmp_path, capsys):
    assert convert(pretraining, '-o', tmp_path / 'out') == 0
    captured = capsys.readouterr()
    assert captured.out == f'{tmp_path / "out"}\n'
    num_values = num_in_pyramid(torch.load(pretraining)['model'])
    for part in (
            f'w.pt: official layout, SHA-256 {sha256_of(pretraining)}', 'taken from model, not from model_ema',
            f'pyramid {num_values:,}', 'taken for fast_itpn_tiny.mim_in1k by its contents; name another with --model',
            'not verified: do that with --verify'):
        assert part in captured.err, part


def test_json_is_all_that_goes_to_stdout(pretraining, tmp_path, capsys):
    output = tmp_path / 'out'
    assert convert(pretraining, '--model', 'fast_itpn_tiny_fpn.mim_in1k', '-o', output, '--verify', '--json') == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert captured.err == ''
    assert report['model'] == 'fast_itpn_tiny_fpn.mim_in1k' and not report['guessed'] and report['verified']
    assert report['source']['sha256'] == sha256_of(pretraining) and report['source']['others'] == ['model_ema']
    weights = torch.load(pretraining)['model']
    assert sum(report['parts'].values()) == sum(value.numel() for value in weights.values())
    assert report['output'] == str(output)
    assert convert(output, '--reverse', '-o', tmp_path / 'back.pt', '--dtype', 'float32', '--verify', '--json') == 0
    report = json.loads(capsys.readouterr().out)
    assert report['sha256'] == sha256_of(tmp_path / 'back.pt') and report['dtypes'] == ['float32']


@pytest.mark.parametrize('args, message', [
    (['w.pt', '-o', 'out', '--model', 'itpn_base.no'], '; there are: fast_itpn_base.mim_in1k, '),
    (['w.pt', '-o', 'out', '--img-size', '224', '240'], 'has 196 tokens, but 224 x 240 pixels are 14 x 15'),
    (['w.pt', '-o', 'out', '--reverse'], 'is in official layout already'),
    (['w.pt', '-o', 'out', '--reverse', '--model', 'x', '--std', '1'], '--model, --std has no meaning with --reverse'),
])
def test_mistakes_are_one_sentence(args, message, pretraining, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.symlink(pretraining, 'w.pt')
    assert convert(*args) == 1
    captured = capsys.readouterr()
    assert captured.out == '' and captured.err.startswith('timm-itpn: ') and captured.err.count('\n') == 1
    assert message in captured.err
    assert os.listdir() == ['w.pt']


def test_interrupted_conversion_leaves_nothing(pretraining, tmp_path, monkeypatch):
    """Ctrl-C, while the folder is being written."""
    def interrupt(*_):
        assert any(tmp_path.iterdir())
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what runs in the background
    try:
        with monkeypatch.context() as patch:
            patch.setattr(conversion, '_model_card', interrupt)  # the last thing written
            assert convert(pretraining, '-o', tmp_path / 'out') == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert not any(tmp_path.iterdir())
    assert convert(pretraining, '-o', tmp_path / 'out') == 0
    assert timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).num_classes == 0

"""The demo, shortened to one epoch; `.ci/run` runs it whole."""
import argparse
import importlib.util
import json

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset

from timm_itpn.cli import demo, main


@pytest.mark.usefixtures('small_models')
def test_demo_trains_validates_and_leaves_a_checkpoint_for_timm(tmp_path, capsys):
    output = tmp_path / 'demo'
    argv = ['demo', '--output', str(output), '--epochs', '1', '--img-size', '16', '--batch-size', '32']
    assert main(argv) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert 'update' in captured.err  # the progress bar
    assert result['images'] == 360 and result['top1'] > 15  # far above chance after 45 updates

    args = torch.load(result['checkpoint'], weights_only=False)['args']
    assert (args.model, args.crop_pct, args.num_classes, args.output) == ('fast_itpn_tiny', 1.0, 10, str(output))
    assert sorted(path.name for path in output.iterdir()) == ['data', 'demo.png', 'last.pth.tar', 'result.json']
    assert (output / 'last.pth.tar').stat().st_size < 100e6  # weights alone
    assert main(['convert', result['checkpoint'], '-o', str(tmp_path / 'digits')]) == 0
    assert "from the checkpoint's args: " in capsys.readouterr().err
    model = timm.create_model('fast_itpn_tiny', num_classes=10, img_size=16, checkpoint_path=result['checkpoint'])
    folder = timm.create_model(f'local-dir:{tmp_path / "digits"}', pretrained=True)
    assert folder.pretrained_cfg['crop_pct'] == 1.0 != model.pretrained_cfg['crop_pct']
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=folder))
    dataset = create_dataset('', root=result['data'], split='val', transform=transform)
    batch = torch.stack([image for image, _ in dataset])
    with torch.inference_mode():
        predicted = model.eval()(batch).argmax(dim=1)
        assert torch.equal(folder.eval()(batch).argmax(dim=1), predicted)
    target = torch.tensor([label for _, label in dataset])
    assert round(100 * (predicted == target).float().mean().item(), 2) == result['top1']
    assert Image.open(result['picture']).size[0] > 1000

    assert main(argv) == 1  # nothing is overwritten
    assert f'{output} exists already' in capsys.readouterr().err


def test_missing_packages_are_named(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'sklearn' else find(name))
    assert main(['demo', '--output', str(tmp_path / 'demo')]) == 1
    assert "the demo needs sklearn: pip install 'timm-itpn[demo]'" in capsys.readouterr().err
    assert not (tmp_path / 'demo').exists()


def test_interrupted_demo_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        assert any(tmp_path.iterdir())
        raise KeyboardInterrupt
    monkeypatch.setattr(demo, 'train', interrupt)
    assert main(['demo', '--output', str(tmp_path / 'new' / 'demo'), '--img-size', '16']) == 130
    assert not any(tmp_path.iterdir())


def test_loss_that_is_not_finite_stops(tmp_path):
    args = argparse.Namespace(lr=1e-3, epochs=1, output=tmp_path, device='cpu', run=None)
    model = torch.nn.Linear(4, 10)
    torch.nn.init.constant_(model.weight, float('nan'))
    batch = [(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(RuntimeError, match='the loss is nan in epoch 0: lower --lr'):
        demo.train(model, batch, batch, args)

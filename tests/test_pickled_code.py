"""A weight file that would run code when it is unpickled runs none, by whatever way it is opened."""
import json

import pytest
import timm
import torch
from PIL import Image
from support import drive_server
from support.explosive import Explosive
from timm.models import load_checkpoint, load_state_dict

from timm_itpn.cli import main
from timm_itpn.weights.sources import SOURCES

pytestmark = pytest.mark.usefixtures('one_thread')

NAME = 'fast_itpn_tiny.mim_in1k'
SOURCE = SOURCES[NAME]


@pytest.fixture
def bomb(tmp_path):
    path = tmp_path / 'bomb.pt'
    content = {'model': {'pos_embed': torch.zeros(1, 196, 384), 'spy': Explosive(tmp_path / 'mark')}}
    torch.save(content, path)
    return path


def by_file(bomb, tmp_path, **_):
    timm.create_model('fast_itpn_tiny', pretrained=True, pretrained_cfg_overlay=dict(file=str(bomb)))


def by_checkpoint_path(bomb, **_):
    timm.create_model('fast_itpn_tiny', checkpoint_path=str(bomb))


def by_load_checkpoint(bomb, **_):
    load_checkpoint(timm.create_model('fast_itpn_tiny'), str(bomb))


def by_folder(bomb, tmp_path, monkeypatch, **_):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder' / SOURCE.file_name).write_bytes(bomb.read_bytes())
    monkeypatch.setenv('TIMM_ITPN_WEIGHTS', str(tmp_path / 'folder'))
    timm.create_model('fast_itpn_tiny', pretrained=True)


def by_own_hub(bomb, tmp_path, hub, monkeypatch, **_):
    hub.commit(f'someone/{NAME}', {'model.safetensors': bomb.read_bytes()})
    monkeypatch.setenv('TIMM_ITPN_HUB', 'someone')
    timm.create_model('fast_itpn_tiny', pretrained=True, cache_dir=tmp_path / 'cache')


def by_published_hub(bomb, tmp_path, hub, **_):
    hub.commit(SOURCE.hub_repo, {SOURCE.hub_path: bomb.read_bytes()})
    timm.create_model('fast_itpn_tiny', pretrained=True, cache_dir=tmp_path / 'cache')


def by_drive(bomb, tmp_path, hub, monkeypatch, **_):
    pytest.importorskip('gdown')
    drive_server.Drive(bomb.read_bytes(), monkeypatch)
    timm.create_model('fast_itpn_tiny', pretrained=True, cache_dir=tmp_path / 'cache')


def by_local_dir(bomb, tmp_path, **_):
    config = {'architecture': 'fast_itpn_tiny', 'pretrained_cfg': {'num_classes': 0}}
    (tmp_path / 'dir').mkdir()
    (tmp_path / 'dir' / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'dir' / 'pytorch_model.bin').write_bytes(bomb.read_bytes())
    timm.create_model(f'local-dir:{tmp_path / "dir"}', pretrained=True)


def by_hub_name(bomb, tmp_path, hub, **_):
    config = {'architecture': 'fast_itpn_tiny', 'pretrained_cfg': {'num_classes': 0}}
    hub.commit('someone/model', {
        'config.json': json.dumps(config).encode(), 'pytorch_model.bin': bomb.read_bytes()})
    timm.create_model('hf-hub:someone/model', pretrained=True, cache_dir=tmp_path / 'cache')


def command(*args):
    """Run a command that ends well or with a sentence."""
    assert main([*map(str, args)]) in (0, 1)


def by_convert(bomb, tmp_path, **_):
    command('convert', bomb, '-o', tmp_path / 'out', '--verify')
    command('convert', bomb, '--model', NAME, '--ema', '-o', tmp_path / 'out')
    command('convert', bomb, '--reverse', '-o', tmp_path / 'out.pt')


def by_inspect(bomb, tmp_path, **_):
    command('inspect', bomb)
    command('inspect', bomb, '--json', '--model', NAME)


def by_show(bomb, tmp_path, **_):
    Image.new('RGB', (32, 32)).save(tmp_path / 'image.png')
    command('show', tmp_path / 'image.png', '--checkpoint', bomb, '--output', tmp_path / 'shown.png')


DOORS = [value for key, value in list(globals().items()) if key.startswith('by_')]


@pytest.mark.parametrize('door', DOORS)
def test_code_never_runs(door, bomb, tmp_path, hub, monkeypatch):
    try:
        door(bomb=bomb, tmp_path=tmp_path, hub=hub, monkeypatch=monkeypatch)
    except (RuntimeError, ValueError):
        pass  # the file has no weights of the model
    assert not (tmp_path / 'mark').exists()


def test_the_file_is_one_that_would(bomb, tmp_path):
    load_state_dict(str(bomb), weights_only=False)  # it is meant to run here
    assert (tmp_path / 'mark').exists()

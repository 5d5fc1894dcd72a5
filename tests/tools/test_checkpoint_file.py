"""What a checkpoint says beside its weights goes into the converted folder, and is checked on the way."""
import argparse
import inspect
import json

import pytest
import timm
import torch
from PIL import Image
from support.small import images
from timm.data import create_transform, resolve_data_config

from timm_itpn.cli import main
from timm_itpn.models import ITPN
from timm_itpn.tools import checkpoint_file
from timm_itpn.tools.convert import convert, revert
from timm_itpn.weights.layout import native_to_official

pytestmark = pytest.mark.usefixtures('one_thread')

TINY = dict(embed_dim=64, depths=(1, 1, 2), num_heads=4, img_size=32)
DATA = dict(crop_pct=0.6, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7], interpolation='nearest', crop_mode='squash')


def write(path, kwargs=TINY, **args):
    """A checkpoint as timm's `train.py` writes it, of an untrained model; return the model."""
    torch.manual_seed(0)
    model = timm.create_model('fast_itpn_tiny', num_classes=args.get('num_classes', 5), **kwargs).eval()
    torch.nn.init.normal_(model.head.fc.weight)
    args = {
        **dict.fromkeys(DATA), 'model': 'fast_itpn_tiny.mim_in1k', 'model_kwargs': dict(kwargs), 'img_size': None,
        'gp': None, 'class_map': '', 'lr': 0.1, **args}
    torch.save({'state_dict': model.state_dict(), 'args': argparse.Namespace(**args)}, path)
    return model


def config_of(folder):
    return json.loads((folder / 'config.json').read_text())


def pictures():
    pixels = (255 * images(24, 48, 40, 3).sigmoid()).to(torch.uint8)
    return [Image.fromarray(image.numpy()) for image in pixels]


def predictions(model, data):
    """What a model makes of pictures that are prepared as timm does."""
    transform = create_transform(**data)
    with torch.inference_mode():
        return model.eval()(torch.stack([transform(picture) for picture in pictures()]))


def test_folder_sees_images_as_the_training_did(tmp_path):
    write(tmp_path / 'w.pt', **DATA)
    report = convert(tmp_path / 'w.pt', tmp_path / 'out', verify=True)
    assert report['model'] == 'fast_itpn_tiny' and not report['guessed']
    trained = timm.create_model('fast_itpn_tiny', num_classes=5, checkpoint_path=tmp_path / 'w.pt', **TINY)
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    expected = predictions(trained, resolve_data_config(dict(DATA, img_size=32), model=trained))
    found = predictions(loaded, resolve_data_config(model=loaded))
    torch.testing.assert_close(found, expected)
    default = predictions(trained, resolve_data_config({'img_size': 32}, model=trained))
    assert len(expected.argmax(1).unique()) > 1 and (default.argmax(1) != expected.argmax(1)).any()

    convert(tmp_path / 'out', tmp_path / 'again', dtype=torch.bfloat16)  # a folder does not forget either
    assert config_of(tmp_path / 'again') == config_of(tmp_path / 'out')


def test_inspect_names_the_model_of_own_size_that_convert_takes(tmp_path, capsys):
    write(tmp_path / 'w.pt', dict(TINY, img_size=(32, 64)))
    convert(tmp_path / 'w.pt', tmp_path / 'out')
    for path in (tmp_path / 'w.pt', tmp_path / 'out', tmp_path / 'out' / 'model.safetensors'):
        assert main(['inspect', str(path), '--json']) == 0
        facts = json.loads(capsys.readouterr().out)
        model, = facts['models']
        assert (facts['model'], model['name'], model['fits']) == ('fast_itpn_tiny', 'fast_itpn_tiny', True)
        assert (model['args']['embed_dim'], model['args']['img_size']) == (64, [32, 64]) and not facts['problem']


@pytest.mark.parametrize(('kwargs', 'args'), [
    (dict(acceleration='full', gather_window=2, img_size=64), {}),
    (dict(migrate={0: 2}, img_size=(32, 64)), {}),
    (dict(dynamic_img_size=True), dict(img_size=64)),
    ({}, dict(gp='max')),
    (dict(num_heads=2, norm_layer='layernormfp32', act_layer='relu', in_chans=1), {}),
])
def test_folder_has_the_model_as_it_was_created(kwargs, args, tmp_path):
    write(tmp_path / 'w.pt', {**TINY, **kwargs}, **args)
    model = timm.create_model(
        'fast_itpn_tiny', num_classes=5, global_pool=args.get('gp'), checkpoint_path=tmp_path / 'w.pt', **TINY | kwargs)
    model.eval()
    convert(tmp_path / 'w.pt', tmp_path / 'out', verify=True)
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    size = loaded.pretrained_cfg['input_size']
    assert size[1:] == ((64, 64) if 'img_size' in args else tuple(model.patch_embed.img_size))
    x = images(2, *size)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), model(x))
    revert(tmp_path / 'out', tmp_path / 'official.pt', verify=True)


def test_every_argument_of_the_model_is_thought_of():
    told_by_weights = {
        'img_size', 'in_chans', 'num_classes', 'init_values', 'rel_pos_bias', 'pyramid', 'pyramid_dim', 'pyramid_depth'}
    of_registered_model = {'family'}
    not_of_outputs = {
        'drop_rate', 'pos_drop_rate', 'proj_drop_rate', 'attn_drop_rate', 'drop_path_rate', 'attn_impl', 'pyramid_init',
        'head_init_scale', 'device', 'dtype'}
    known = {*checkpoint_file.MODEL_ARGS, *told_by_weights, *of_registered_model, *not_of_outputs}
    assert known == set(inspect.signature(ITPN).parameters)


def test_command_line_overrules_and_says_what_is_from_where(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write('w.pt', crop_pct=0.6, mean=[0.5], std='wide', class_map='names.txt\x1b', model='local-dir:x\x1b')
    (tmp_path / 'names.txt').write_text('\ufeff' + '\n'.join('abcde'))  # with the mark of Windows
    argv = ['convert', 'w.pt', '-o', 'out', '--std', '0.25', '--crop-mode', 'border', '--model', 'fast_itpn_tiny']
    assert main(argv) == 0
    err = capsys.readouterr().err
    assert 'from the command line: std [0.25], crop_mode border\n' in err
    assert "from the checkpoint's args: " in err and 'crop_pct 0.6, mean [0.5]\n' in err
    assert "from the model's defaults: interpolation bicubic\n" in err
    assert r'names of the classes are in names.txt\x1b: add them with --class-map' in err
    assert r'its args name local-dir:x\x1b, whose config is not in the checkpoint: compare the two' in err
    cfg = config_of(tmp_path / 'out')['pretrained_cfg']
    assert (cfg['mean'], cfg['std'], cfg['crop_pct'], cfg['crop_mode']) == ([0.5] * 3, [0.25] * 3, 0.6, 'border')
    argv[3] = 'named'
    assert main([*argv, '--class-map', 'names.txt', '--crop-pct', '1']) == 0
    loaded = timm.create_model(f'local-dir:{tmp_path / "named"}')
    assert loaded.pretrained_cfg['label_names'] == list('abcde') and loaded.pretrained_cfg['crop_pct'] == 1.0


HUGE = 10 ** 5000


@pytest.mark.parametrize(('args', 'message'), [
    (dict(crop_pct=float('nan')), "crop_pct in the checkpoint's args must be a number from 0.1 to 2: give the right"),
    (dict(crop_pct=1e-9), '--crop-pct'), (dict(crop_pct=HUGE), '--crop-pct'), (dict(crop_pct=True), '--crop-pct'),
    (dict(crop_pct='0.9'), '--crop-pct'), (dict(crop_pct=[1]), '--crop-pct'), (dict(crop_pct={1}), '--crop-pct'),
    (dict(mean=[0.1, 0.2]), 'mean .* for each channel: give the right one with --mean'),
    (dict(mean=[float('inf')] * 3), '--mean'), (dict(mean=0.5), '--mean'), (dict(mean=torch.zeros(3)), '--mean'),
    (dict(std=[0, 0, 0]), 'std .* above 0'), (dict(std=[HUGE] * 3), '--std'), (dict(std={'a': 1}), '--std'),
    (dict(interpolation='random'), 'must be one of nearest, bilinear'), (dict(interpolation=['box']), 'must be one'),
    (dict(crop_mode='../x'), 'must be one of center, squash, border'), (dict(crop_mode=torch.nn.Module), 'must be one'),
    (dict(model_kwargs=[1]), 'model_kwargs .* cannot be read'),
    (dict(model_kwargs=dict(num_heads=torch.ones(1))), 'model_kwargs .* cannot be read'),
])
def test_values_that_cannot_be_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        said = checkpoint_file.from_training(args)
        checkpoint_file.check_data(said.data, 3, said.source)


@pytest.mark.parametrize(('args', 'message'), [
    (dict(gp='most'), 'global_pool'), (dict(gp=3), 'global_pool'), (dict(crop_pct=3), '--crop-pct'),
    (dict(model_kwargs=dict(TINY, acceleration='more')), 'acceleration .more. is unknown'),
])
def test_checkpoint_with_such_values_leaves_nothing(args, message, tmp_path):
    write(tmp_path / 'w.pt')
    checkpoint = torch.load(tmp_path / 'w.pt', weights_only=False)  # our own, with a Namespace
    vars(checkpoint['args']).update(args)
    torch.save(checkpoint, tmp_path / 'w.pt')
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / 'w.pt', tmp_path / 'new' / 'folder' / 'out')
    assert [path.name for path in tmp_path.iterdir()] == ['w.pt']


def test_nothing_that_loads_or_fetches_is_taken(tmp_path):
    """An official file too: what training scripts of others call by timm's names."""
    state = native_to_official(timm.create_model('fast_itpn_tiny', num_classes=5, img_size=32).state_dict())
    evil = dict(pretrained=True, checkpoint_path='/x', pretrained_cfg={'file': '/x'}, features_only=True, device='x')
    tried = dict(model='../x', input_size=32, model_kwargs=evil), dict(model=3, img_size='big', input_size=[0, 2])
    for i, args in enumerate(tried):
        torch.save({'model': state, 'args': args}, tmp_path / 'w.pt')
        report = convert(tmp_path / 'w.pt', tmp_path / f'out{i}')
        assert report['model'] == 'fast_itpn_tiny' and report['guessed']


def test_config_of_something_else_is_refused(tmp_path):
    write(tmp_path / 'w.pt')
    convert(tmp_path / 'w.pt', tmp_path / 'out')
    for text in ('', '[]', '{', '{"pretrained_cfg": [1]}', '{"model_args": 3}', 10 ** 5 * '[', '\xff\x00'):
        (tmp_path / 'out' / 'config.json').write_text(text, encoding='latin-1')
        path = tmp_path / 'out' / ('model.safetensors' if text == '{' else '')
        with pytest.raises(ValueError, match='config.json is not a (config of timm .*: mend it|text file)'):
            convert(path, tmp_path / 'again')

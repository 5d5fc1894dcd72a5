"""From official checkpoints to timm's Hub folders and back; from folders to models."""
import argparse
import json
import resource
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import golden
from support.small import SMALL, images, num_in_pyramid, official_weights, small_model

from timm_itpn import __version__
from timm_itpn.tools import convert as conversion
from timm_itpn.tools.convert import convert, revert
from timm_itpn.weights.layout import native_to_official
from timm_itpn.weights.sources import SOURCES, sha256_of

pytestmark = pytest.mark.usefixtures('one_thread')


def as_trained(state_dict, **others):
    """A checkpoint as the official training code writes it."""
    moments = {i: {'exp_avg': torch.zeros_like(value)} for i, value in enumerate(state_dict.values())}
    args = argparse.Namespace(lr=1e-4)
    return {'model': state_dict, 'optimizer': {'state': moments}, 'epoch': 99, 'args': args, **others}


@pytest.fixture
def classifier(tmp_path_factory, small_models):
    path = tmp_path_factory.mktemp('official') / 'classifier.pt'
    torch.save(as_trained(official_weights(num_classes=1000)), path)
    return path


@pytest.fixture
def pretraining(tmp_path_factory, small_models):
    path = tmp_path_factory.mktemp('official') / 'fast_itpn_tiny_1600e_1k.pt'
    weights = official_weights(num_classes=0, pyramid=True)
    torch.save({'model': {key: value.half() for key, value in weights.items()}}, path)
    return path


@pytest.fixture
def small_file(tmp_path, small_models):
    """Writes w.pt, an official checkpoint of a tiny model, which is small in these tests; gives the model."""
    def write(name='fast_itpn_tiny', **kwargs):
        model = small_model(name, **kwargs)
        torch.save({'model': native_to_official(model.state_dict())}, tmp_path / 'w.pt')
        return model
    return write


def config_of(folder):
    return json.loads((folder / 'config.json').read_text())


# what is written

def test_folder_has_weights_config_and_card(pretraining, tmp_path):
    report = convert(pretraining, tmp_path / 'out', 'fast_itpn_tiny.mim_in1k')
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'README.md', 'config.json', 'model.safetensors'}
    assert len({path.stat().st_mode for path in (tmp_path / 'out').iterdir()}) == 1
    with safe_open(tmp_path / 'out' / 'model.safetensors', 'pt') as file:
        assert file.metadata() == {
            'format': 'pt', 'model': 'fast_itpn_tiny.mim_in1k', 'source': pretraining.name,
            'source_sha256': sha256_of(pretraining)}
    config = config_of(tmp_path / 'out')
    assert config['architecture'] == 'fast_itpn_tiny' and config['num_classes'] == 0
    assert config['pretrained_cfg']['tag'] == 'mim_in1k' and 'num_classes' not in config['model_args']
    card = (tmp_path / 'out' / 'README.md').read_text()
    num_values = num_in_pyramid(torch.load(pretraining)['model'])
    for part in (
            'library_name: timm\nlicense: unknown\n', pretraining.name, sha256_of(pretraining), report['date'],
            f'timm-itpn {__version__}', f'pyramid: {num_values:,} values', 'under `model`',
            'Reported by the authors, not measured for this copy', 'ImageNet-1K top-1 after fine-tuning: 85.1 at 224',
            'Its SHA-256 was not checked: no SHA-256 is known of fast_itpn_tiny.mim_in1k'):
        assert part in card, part


def test_all_parts_are_written_in_the_type_asked_for(pretraining, tmp_path):
    report = convert(pretraining, tmp_path / 'out', dtype=torch.bfloat16, verify=True)
    native = load_file(tmp_path / 'out' / 'model.safetensors')
    assert report['dtypes'] == ['bfloat16'] and {value.dtype for value in native.values()} == {torch.bfloat16}
    weights = torch.load(pretraining)['model']
    assert sum(value.numel() for value in native.values()) == sum(value.numel() for value in weights.values())
    assert torch.equal(native['pretrain.mask_token'], weights['mask_token'].bfloat16())


@pytest.mark.parametrize('ema, factor', [(False, 1), (True, 2)])
def test_averaged_weights_are_taken_when_asked_for(ema, factor, small_file, tmp_path):
    model = small_file()
    weights = torch.load(tmp_path / 'w.pt')['model']
    torch.save({'model': weights, 'model_ema': {k: 2 * v for k, v in weights.items()}}, tmp_path / 'w.pt')
    report = convert(tmp_path / 'w.pt', tmp_path / 'out', ema=ema)
    assert report['source']['wrapper'] == ('model_ema' if ema else 'model')
    assert report['source']['others'] == ['model' if ema else 'model_ema']
    native = load_file(tmp_path / 'out' / 'model.safetensors')
    assert torch.equal(native['head.fc.weight'], factor * model.head.fc.weight)


# which model

def test_own_weights_are_not_taken_for_published_ones(classifier, tmp_path):
    assert convert(classifier, tmp_path / 'out')['model'] == 'fast_itpn_tiny'
    config, card = config_of(tmp_path / 'out'), (tmp_path / 'out' / 'README.md').read_text()
    assert config['pretrained_cfg']['tag'] == '' and 'origin_url' not in config['pretrained_cfg']
    assert 'Not a published file of the authors' in card and 'Reported by the authors' not in card


@pytest.mark.parametrize('known, sentence', [(True, 'is the known SHA-256'), (False, 'is not the known one of')])
def test_known_hash_is_compared(known, sentence, pretraining, tmp_path, monkeypatch):
    name = 'fast_itpn_tiny.mim_in1k'
    sha256 = sha256_of(pretraining) if known else '0' * 64
    monkeypatch.setitem(SOURCES, name, SOURCES[name]._replace(sha256=sha256))
    if not known:
        with pytest.raises(ValueError, match='its SHA-256 is [0-9a-f]{64}, not 0{64}.: .* give it another name'):
            convert(pretraining, tmp_path / 'out')
        pretraining = shutil.copy(pretraining, tmp_path / 'mine.pt')
    convert(Path(pretraining), tmp_path / 'out')
    assert sentence in (tmp_path / 'out' / 'README.md').read_text()


@pytest.mark.parametrize('name, args, taken_for', [
    ('hivit_base', dict(), 'hivit_base'),
    ('fast_itpn_tiny_fpn', dict(num_classes=0, pyramid=True), 'fast_itpn_tiny'),
])
def test_native_weights_are_never_published_ones(name, args, taken_for, tmp_path):
    state_dict = timm.create_model(name, **args).half().state_dict()
    if not args.get('num_classes', 1):
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith('head.')}
    torch.save({'state_dict': state_dict}, tmp_path / 'mine.pth.tar')
    assert convert(tmp_path / 'mine.pth.tar', tmp_path / 'out')['model'] == taken_for
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert 'license: unknown' in card and 'Reported by the authors' not in card
    tag = timm.get_pretrained_cfg(taken_for).tag
    with pytest.raises(ValueError, match=f'not the published file of .*it is in native layout.*--model {taken_for}'):
        convert(tmp_path / 'mine.pth.tar', tmp_path / 'tagged', f'{taken_for}.{tag}')


def test_tag_that_the_weights_contradict_is_refused(small_file, tmp_path):
    small_file()
    with pytest.raises(ValueError, match='it has a classifier, unlike the published file of fast_itpn_tiny.mim_in1k'):
        convert(tmp_path / 'w.pt', tmp_path / 'out', 'fast_itpn_tiny.mim_in1k', img_size=(64, 64))


def test_converted_folder_says_what_it_is(pretraining, tmp_path):
    """Converted once more, it keeps its name and origin."""
    convert(pretraining, tmp_path / 'one', 'fast_itpn_tiny_fpn.mim_in1k')
    report = convert(tmp_path / 'one', tmp_path / 'two', dtype=torch.float32, verify=True)
    assert report['model'] == 'fast_itpn_tiny_fpn.mim_in1k'
    assert report['source']['origin'] == {'file': pretraining.name, 'sha256': sha256_of(pretraining)}
    assert sha256_of(pretraining) in (tmp_path / 'two' / 'README.md').read_text()


def test_converted_folder_keeps_size_and_pooling(small_file, tmp_path):
    small_file('itpn_tiny', img_size=(48, 64))
    convert(tmp_path / 'w.pt', tmp_path / 'three', 'itpn_tiny', img_size=(48, 64))
    config = config_of(tmp_path / 'three')
    config['global_pool'] = config['model_args']['global_pool'] = 'max'
    (tmp_path / 'three' / 'config.json').write_text(json.dumps(config))
    convert(tmp_path / 'three', tmp_path / 'four', verify=True)
    revert(tmp_path / 'four', tmp_path / 'back.pt', verify=True)
    model = timm.create_model(f'local-dir:{tmp_path / "four"}', pretrained=True)
    assert (model.patch_embed.img_size, model.global_pool) == ((48, 64), 'max')


def test_pooling_of_a_training_checkpoint_is_kept(small_file, tmp_path):
    model = small_file(global_pool='max')
    torch.save({'state_dict': model.state_dict(), 'args': argparse.Namespace(gp='max')}, tmp_path / 'last.pth.tar')
    report = convert(tmp_path / 'last.pth.tar', tmp_path / 'out', verify=True)
    assert (report['global_pool'], report['source']['layout'], report['num_classes']) == (
        'max', 'native', SMALL['num_classes'])
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize('kwargs, expected', [
    (dict(num_classes=1), {}),
    (dict(), {}),
    (dict(init_values=0.), {'init_values': 0.}),
    (dict(in_chans=1), {'in_chans': 1}),
    (dict(img_size=224), {}),
])
def test_model_args_are_told_from_the_file(kwargs, expected, small_file, tmp_path):
    model = small_file(**kwargs)
    convert(tmp_path / 'w.pt', tmp_path / 'out', verify=True)
    args = config_of(tmp_path / 'out')['model_args']
    assert expected.items() <= args.items() and ('init_values' in args) == ('init_values' in kwargs)
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    x = images(2, model.in_chans, *model.patch_embed.img_size)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), model(x))


def test_itpn_args_are_told_from_the_file(small_file, tmp_path):
    model = small_file('itpn_tiny_fpn', pyramid=True, rel_pos_bias=False, init_values=0.1, pyramid_depth=2)
    convert(tmp_path / 'w.pt', tmp_path / 'out', 'itpn_tiny_fpn', verify=True)
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True, features_only=True).eval()
    x = images(1, 3, 64, 64)
    with torch.inference_mode():
        for ours, theirs in zip(loaded(x), model.forward_intermediates(x, intermediates_only=True)):
            torch.testing.assert_close(ours, theirs)


def test_one_network_under_two_names_is_asked_for(small_file, tmp_path):
    small_file('hivit_tiny')
    with pytest.raises(ValueError, match='which hivit_tiny and itpn_tiny are: choose one with --model'):
        convert(tmp_path / 'w.pt', tmp_path / 'out')
    assert convert(tmp_path / 'w.pt', tmp_path / 'out', 'hivit_tiny')['model'] == 'hivit_tiny'


@pytest.mark.parametrize('name, message', [
    ('fast_itpn_small', r'is of Fast-iTPN with depths \[1, 2, 2\].* but the model is of .*\[2, 2, 20\]'),
    ('itpn_tiny', r'is of Fast-iTPN .* but the model is of iTPN'),
    ('resnet50', 'there is no model .resnet50.; there are: fast_itpn_base'),
    ('fast_itpn_tiny_fpn', 'no feature pyramid, which fast_itpn_tiny_fpn needs: take fast_itpn_tiny with --model'),
])
def test_model_that_does_not_fit_is_refused(name, message, classifier, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(classifier, tmp_path / 'out', name)
    assert not any(tmp_path.iterdir())


def test_grid_that_is_no_square_is_asked_for(small_file, tmp_path):
    model = small_file(img_size=(48, 64))
    with pytest.raises(ValueError, match='12 tokens, which is not a square grid: .* with --img-size HEIGHT WIDTH'):
        convert(tmp_path / 'w.pt', tmp_path / 'out')
    convert(tmp_path / 'w.pt', tmp_path / 'out', img_size=(48, 64), verify=True)
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert torch.equal(loaded.stages[2].pos_embed, model.stages[2].pos_embed)


# to models

def test_pyramid_model_loads_from_the_folder_of_the_plain_one(pretraining, tmp_path, monkeypatch):
    convert(pretraining, tmp_path / 'weights' / 'fast_itpn_tiny.mim_in1k')
    file = tmp_path / 'weights' / 'fast_itpn_tiny.mim_in1k' / 'model.safetensors'
    monkeypatch.setenv('TIMM_ITPN_WEIGHTS', str(tmp_path / 'weights'))
    models = [
        timm.create_model('fast_itpn_tiny_fpn', pretrained=True, features_only=True),
        timm.create_model(f'local-dir:{file.parent}', pretrained=True, features_only=True, pyramid=True),
        timm.create_model(
            'fast_itpn_tiny_fpn', pretrained=True, features_only=True, pretrained_cfg_overlay=dict(file=str(file))),
    ]
    whole = timm.create_model('fast_itpn_tiny', pyramid=True).eval()
    whole.load_state_dict(torch.load(pretraining)['model'], strict=False)  # a pre-training file has no classifier
    x = images(1, 3, 224, 224)
    with torch.inference_mode():
        expected = whole.forward_intermediates(x, intermediates_only=True)
        for model in models:
            for level, wanted in zip(model.eval()(x), expected, strict=True):
                torch.testing.assert_close(level, wanted)


# and back

@pytest.mark.parametrize(('name', 'dtype'), [('fast_itpn_tiny_mim', torch.float32), ('itpn_base_mae', torch.float16)])
def test_round_trip_is_the_same_to_the_bit(name, dtype, tmp_path):
    official = golden.official_state_dict(golden.load(name), dtype)
    torch.save({'module': {f'module.{key}': value for key, value in official.items()}}, tmp_path / 'w.pt')
    convert(tmp_path / 'w.pt', tmp_path / 'out')
    report = revert(tmp_path / 'out', tmp_path / 'back' / 'w.pt', verify=True)
    back = torch.load(tmp_path / 'back' / 'w.pt')['model']
    assert report['sha256'] == sha256_of(tmp_path / 'back' / 'w.pt')
    assert {key: value.dtype for key, value in back.items()} == {key: value.dtype for key, value in official.items()}
    assert all(torch.equal(back[key], value) for key, value in official.items())
    size = sum(value.nbytes for value in official.values())
    assert (tmp_path / 'back' / 'w.pt').stat().st_size < 1.01 * size  # no part of a tensor is saved with the whole


def test_incomplete_weights_are_not_reverted(tmp_path):
    state_dict = timm.create_model('fast_itpn_tiny', num_classes=3).state_dict()
    del state_dict['patch_embed.proj.bias'], state_dict['stages.2.blocks.3.ls1.gamma']
    torch.save(state_dict, tmp_path / 'w.pt')
    with pytest.raises(ValueError, match='it lacks patch_embed.proj.bias, stages.2.blocks.3.ls1.gamma.$'):
        revert(tmp_path / 'w.pt', tmp_path / 'back.pt')
    assert not (tmp_path / 'back.pt').exists()


@pytest.mark.parametrize('function', [convert, revert])
def test_type_that_cannot_hold_a_value_is_refused(function, tmp_path):
    state_dict = timm.create_model('fast_itpn_tiny', num_classes=3).state_dict()
    state_dict['head.fc.bias'][1] = 1e6
    torch.save(state_dict, tmp_path / 'w.pt')
    with pytest.raises(ValueError, match='head.fc.bias has values that torch.float16 cannot hold'):
        function(tmp_path / 'w.pt', tmp_path / 'out', dtype=torch.float16)
    assert not (tmp_path / 'out').exists()


# what goes wrong

@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError(28, 'No space left on device')])
def test_nothing_half_written_is_left(error, classifier, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error
    monkeypatch.setattr(conversion, '_model_card', fail)  # the last thing written
    with pytest.raises((KeyboardInterrupt, OSError, RuntimeError)):
        convert(classifier, tmp_path / 'out')
    monkeypatch.setattr(torch, 'save', fail)
    save_file(small_model('fast_itpn_tiny').state_dict(), tmp_path / 'native.safetensors')
    with pytest.raises((KeyboardInterrupt, OSError, RuntimeError)):
        revert(tmp_path / 'native.safetensors', tmp_path / 'back.pt')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['native.safetensors']


@pytest.mark.parametrize('change', ['value', 'key', 'config'])
def test_verification_finds_what_differs(change, classifier, tmp_path, monkeypatch):
    def spoil_weights(tensors, path, metadata):
        tensors = dict(tensors)
        if change == 'value':
            tensors['head.fc.bias'] = tensors['head.fc.bias'].clone()
            tensors['head.fc.bias'][3] = torch.nextafter(tensors['head.fc.bias'][3], torch.tensor(9.))
        elif change == 'key':
            del tensors['head.fc.bias']
        save_file(tensors, path, metadata)

    def spoil_config(name, args, *others, write=conversion._write_config):
        return write(name, {**args, **(dict(global_pool='max') if change == 'config' else {})}, *others)

    monkeypatch.setattr(conversion, 'save_file', spoil_weights)
    monkeypatch.setattr(conversion, '_write_config', spoil_config)
    messages = {
        'value': r'differs from the checkpoint in head\.bias',
        'key': r'differs from the checkpoint in head\.bias',
        'config': 'other outputs',
    }
    with pytest.raises((RuntimeError, ValueError), match=messages[change]):
        convert(classifier, tmp_path / 'out', verify=True)
    assert not (tmp_path / 'out').exists()


def test_broken_weights_are_refused(small_file, tmp_path):
    small_file()
    weights = torch.load(tmp_path / 'w.pt')
    weights['model']['blocks.6.norm1.weight'][5] = torch.nan
    torch.save(weights, tmp_path / 'w.pt')
    with pytest.raises(ValueError, match='blocks.1.norm1.weight has values that are infinite or not a number'):
        convert(tmp_path / 'w.pt', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('prefix', ['backbone.', 'encoder.body.'])
def test_network_under_a_prefix_is_converted(prefix, small_file, tmp_path):
    model = small_file()
    weights = torch.load(tmp_path / 'w.pt')['model']
    torch.save({'net': {prefix + key: value for key, value in weights.items()}}, tmp_path / 'w.pt')
    report = convert(tmp_path / 'w.pt', tmp_path / 'out', verify=True)
    assert report['source']['wrapper'] == f'net.{prefix[:-1]}'
    native = load_file(tmp_path / 'out' / 'model.safetensors')
    assert all(torch.equal(native[key], value) for key, value in model.state_dict().items() if key in native)

    torch.save({f'{name}.{key}': value for name in 'ab' for key, value in weights.items()}, tmp_path / 'two.pt')
    with pytest.raises(ValueError, match="under 'a', 'b': choose one with .*--prefix"):
        convert(tmp_path / 'two.pt', tmp_path / 'two')
    assert convert(tmp_path / 'two.pt', tmp_path / 'two', prefix='b')['source']['wrapper'] == 'b'


def test_damaged_file_is_named(classifier, tmp_path):
    content = bytearray(classifier.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / 'w.pt').write_bytes(content)
    with pytest.raises(ValueError, match=r'w\.pt .*damaged .*wrong checksum of '):
        convert(tmp_path / 'w.pt', tmp_path / 'out')


@pytest.mark.parametrize('change, message', [
    ({'stages.2.pos_embed': torch.zeros(())}, 'stages.2.pos_embed has the shape .., but needs 3 dimensions'),
    ({'stages.2.blocks.999999999999.norm1.weight': torch.zeros(1)}, 'the model has no stages.2.blocks.999999999999'),
    ({'head.fc.bias': None}, 'incomplete: of head.fc.weight and head.fc.bias it has one only'),
])
def test_strange_entries_are_one_sentence(change, message, small_file, tmp_path):
    small_file()
    convert(tmp_path / 'w.pt', tmp_path / 'native')
    native = {**load_file(tmp_path / 'native' / 'model.safetensors'), **change}
    torch.save({key: value for key, value in native.items() if value is not None}, tmp_path / 'w.pt')
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / 'w.pt', tmp_path / 'out')


@pytest.mark.parametrize('function', [convert, revert])
def test_full_disk_is_one_sentence(function, small_file, tmp_path):
    model = small_file()
    if function is revert:
        torch.save(model.state_dict(), tmp_path / 'w.pt')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match='(File too large|No space left on device).*/out'):
            function(tmp_path / 'w.pt', tmp_path / 'out')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ['w.pt']

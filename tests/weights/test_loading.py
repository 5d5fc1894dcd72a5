"""Weight files through every way that timm has of loading them, good ones and bad ones. The tiny models are small."""
import argparse
import fractions
import functools
import io
import json
import logging
import math
import re
import warnings

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants
from support.explosive import Explosive
from support.small import SIZES, SMALL, images, official_weights, small_model
from timm.models import load_checkpoint, save_for_hf

from timm_itpn.models.itpn import ITPN
from timm_itpn.models.loading import checkpoint_filter_fn
from timm_itpn.tools.convert import convert, revert
from timm_itpn.tools.inspect import inspect
from timm_itpn.weights.layout import native_to_official
from timm_itpn.weights.sources import SOURCES, file_name, plain_name, source_of

REPO, FILE = 'xche32/RELO', 'pretrained/itpn/fast_itpn_tiny_1600e_1k.pt'
IMAGES = images(1, 3, 224, 224)

pytestmark = pytest.mark.usefixtures('small_models')


@pytest.fixture(scope='module')
def classifier():
    """Official weights of a classifier, float32."""
    return official_weights(num_classes=1000)


@pytest.fixture(scope='module')
def pretraining():
    """Official weights of a whole pre-training model."""
    return official_weights(num_classes=0, pyramid=True)


@pytest.fixture(scope='module')
def reference(classifier):
    """The model that has the weights of the classifier; that this computes what it should the goldens say."""
    model = timm.create_model('fast_itpn_tiny', num_classes=1000, **SIZES).eval()
    model.load_state_dict(classifier)
    return model


@pytest.fixture(scope='module')
def native(reference):
    return reference.state_dict()


def load(path, num_classes=1000, cfg_classes=1000, **kwargs):
    overlay = dict(file=str(path), num_classes=cfg_classes)
    return timm.create_model(
        'fast_itpn_tiny', pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay, **kwargs).eval()


def save(content, path):
    torch.save(content, path)
    return path


def as_bytes(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def assert_same(model, reference):
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(IMAGES), reference(IMAGES))


def assert_backbone_of(model, pretraining):
    """The model has the backbone of a pre-training file, and a norm that is new, not the file's `norm`."""
    state = model.state_dict()
    torch.testing.assert_close(state['stages.2.pos_embed'], pretraining['pos_embed'])
    torch.testing.assert_close(state['stages.2.blocks.1.ls2.gamma'], pretraining['blocks.6.gamma_2'])
    assert (state['head.norm.weight'] == 1).all() and (state['head.norm.bias'] == 0).all()


# layouts and wrappers

@pytest.mark.parametrize('wrap', [
    lambda w: {'state_dict': {f'backbone.{key}': value for key, value in w.items()}},
    lambda w: {'net': {f'encoder.body.{key}': value for key, value in w.items()}, 'optimizer': {'state': {}}},
    lambda w: {'checkpoint': {'model': {f'module.model.{key}': value for key, value in w.items()}}},
])
@pytest.mark.parametrize('layout', ['official', 'native'])
def test_network_below_a_prefix_loads_and_the_rest_is_said(
        layout, wrap, classifier, native, reference, tmp_path, caplog):
    content = wrap(classifier if layout == 'official' else native)
    inner = next(iter(content.values()))
    (inner.get('model', inner))['box_head.blocks.0.weight'] = torch.zeros(3)
    with caplog.at_level(logging.INFO):
        assert_same(load(save(content, tmp_path / 'w.pt')), reference)
    assert re.search("Took the network under '.*(backbone|body|model)'; left out 1 other tensors", caplog.text)


def test_safetensors_file_loads(classifier, reference, tmp_path):
    safetensors.torch.save_file(classifier, tmp_path / 'w.safetensors')
    assert_same(load(tmp_path / 'w.safetensors'), reference)


@pytest.mark.parametrize('num_classes', [0, 7])
def test_pretraining_file_loads_and_says_what_starts_new(num_classes, pretraining, tmp_path, caplog):
    path = save({'model': {k: v.half() for k, v in pretraining.items()}}, tmp_path / 'w.pt')
    with caplog.at_level(logging.INFO):
        model = load(path, num_classes=num_classes, cfg_classes=0)
    assert_backbone_of(model, {k: v.half().float() for k, v in pretraining.items()})
    assert 'feature pyramid' in caplog.text and 'norm and classifier start new' in caplog.text
    assert model.num_classes == num_classes


def test_other_channels_classes_and_grid_are_adapted(classifier, tmp_path):
    path = save({'model': classifier}, tmp_path / 'w.pt')
    model = load(path, num_classes=5, in_chans=1, img_size=(64, 96))
    assert model(torch.zeros(1, 1, 64, 96)).shape == (1, 5)
    torch.testing.assert_close(
        model.patch_embed.proj.weight, classifier['patch_embed.proj.weight'].sum(dim=1, keepdim=True))
    resampled = torch.nn.functional.interpolate(
        classifier['pos_embed'].reshape(1, 14, 14, -1).permute(0, 3, 1, 2), size=(4, 6), mode='bicubic')
    torch.testing.assert_close(model.stages[2].pos_embed, resampled.flatten(2).transpose(1, 2))


def test_grid_that_cannot_be_known_is_asked_for(classifier, tmp_path):
    odd = dict(classifier, pos_embed=torch.zeros(1, 35, 128))
    path = save({'model': odd}, tmp_path / 'w.pt')
    with pytest.raises(ValueError, match=r'35 tokens, which is not a square grid.*dict\(input_size=\(3, height'):
        load(path)
    overlay = dict(file=str(path), num_classes=1000, input_size=(3, 80, 112))
    timm.create_model('fast_itpn_tiny', pretrained=True, pretrained_cfg_overlay=overlay, img_size=224)


@pytest.mark.parametrize('cfg_classes, warned', [(1000, False), (0, True), (-1, False)])
def test_unused_classifier_is_not_dropped_in_silence(cfg_classes, warned, classifier, tmp_path, caplog):
    path = save({'model': classifier}, tmp_path / 'w.pt')
    model = load(path, num_classes=1000, cfg_classes=cfg_classes)
    assert torch.equal(model.head.fc.weight, classifier['head.weight']) == (cfg_classes == 1000)
    assert ('To keep it, pass pretrained_cfg_overlay=dict(num_classes=1000)' in caplog.text) == warned


def test_features_only_loads(classifier, reference, tmp_path):
    expected = reference.forward_intermediates(IMAGES, intermediates_only=True)
    path = save({'model': classifier}, tmp_path / 'w.pt')
    overlay = dict(file=str(path), num_classes=1000)
    for feature_cls in ('getter', 'list'):
        backbone = timm.create_model(
            'fast_itpn_tiny', pretrained=True, pretrained_cfg_overlay=overlay, features_only=True,
            feature_cls=feature_cls)
        with torch.inference_mode():
            features = backbone.eval()(IMAGES)
        for feature, wanted in zip(features, expected, strict=True):
            feature = feature if feature_cls == 'getter' else feature.permute(0, 3, 1, 2)
            torch.testing.assert_close(feature, wanted)


# the other doors

def test_checkpoint_path_takes_official_files(classifier, reference, tmp_path):
    for number, content in enumerate((classifier, {'model': classifier}, {'module': classifier})):
        path = save(content, tmp_path / f'{number}.pt')
        assert_same(timm.create_model('fast_itpn_tiny', num_classes=1000, checkpoint_path=str(path)), reference)
        load_checkpoint(timm.create_model('fast_itpn_tiny', num_classes=1000), str(path))


def test_checkpoint_path_names_the_way_for_a_file_without_classifier(pretraining, tmp_path):
    path = save({'model': pretraining}, tmp_path / 'w.pt')
    with pytest.raises(ValueError, match='has no classifier: load it with strict=False.*--pretrained-path'):
        timm.create_model('fast_itpn_tiny', num_classes=10, checkpoint_path=str(path))
    assert_backbone_of(timm.create_model('fast_itpn_tiny', num_classes=0, checkpoint_path=str(path)), pretraining)


def test_parts_of_a_native_state_dict_load_as_with_any_model(native):
    model = timm.create_model('fast_itpn_tiny', num_classes=1000)
    part = {key: value for key, value in native.items() if key.startswith(('head.', 'patch_embed.'))}
    result = model.load_state_dict(part, strict=False)  # only a part is given, on purpose
    assert not result.unexpected_keys and 'stages.2.pos_embed' in result.missing_keys
    assert torch.equal(model.head.fc.weight, native['head.fc.weight'])
    with pytest.raises(RuntimeError, match='Missing key'):
        model.load_state_dict(part)


def test_model_made_without_timms_factory_takes_official_weights(classifier, reference):
    model = ITPN('fast_itpn', **SIZES)
    model.load_state_dict(classifier)
    assert_same(model, reference)
    model.load_state_dict(checkpoint_filter_fn({'model': classifier}, model))
    assert_same(model, reference)


def test_saved_model_comes_back_by_local_dir(classifier, tmp_path):
    model = timm.create_model('fast_itpn_tiny', num_classes=1000)
    model.load_state_dict(classifier)
    model.set_input_size((64, 96))
    save_for_hf(model, tmp_path)
    restored = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert restored.patch_embed.img_size == (64, 96)
    for key, value in model.state_dict().items():
        assert torch.equal(restored.state_dict()[key], value)


# the Hub

def hub_model(**kwargs):
    return timm.create_model('fast_itpn_tiny', pretrained=True, **kwargs)


def test_pretrained_downloads_once_and_then_works_offline(hub, pretraining, tmp_path, monkeypatch):
    hub.commit(REPO, {FILE: as_bytes({'model': pretraining})})
    for _ in range(2):
        assert_backbone_of(hub_model(cache_dir=tmp_path), pretraining)
        assert hub.downloads == [(REPO, FILE)]
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    hub_model(cache_dir=tmp_path)
    with pytest.raises(RuntimeError, match='Hub .*OFFLINE=1 forbids .* Google Drive: .*HF_HUB_OFFLINE=1 forbids'):
        hub_model(cache_dir=tmp_path / 'empty')
    assert hub.downloads == [(REPO, FILE)]


def test_moved_revision_is_followed_and_a_pinned_one_kept(hub, pretraining, tmp_path):
    first = hub.commit(REPO, {FILE: as_bytes({'model': pretraining})})
    hub_model(cache_dir=tmp_path)
    moved = dict(pretraining, pos_embed=pretraining['pos_embed'] + 1)
    hub.commit(REPO, {FILE: as_bytes({'model': moved})})
    assert_backbone_of(hub_model(cache_dir=tmp_path), moved)
    pinned = dict(hf_hub_id=f'{REPO}@{first}')
    assert_backbone_of(hub_model(cache_dir=tmp_path, pretrained_cfg_overlay=pinned), pretraining)


def test_hub_repository_of_a_saved_model_loads(hub, reference, tmp_path):
    save_for_hf(reference, tmp_path / 'saved')
    hub.commit('someone/model', {path.name: path.read_bytes() for path in (tmp_path / 'saved').iterdir()})
    loaded = timm.create_model('hf-hub:someone/model', pretrained=True, cache_dir=tmp_path / 'cache')
    assert_same(loaded, reference)


# bad files

def test_vit_checkpoint_is_refused(tmp_path):
    vit = timm.create_model('vit_tiny_patch16_224').state_dict()
    path = save(vit, tmp_path / 'w.pt')
    for door in (load, lambda p: timm.create_model('fast_itpn_tiny', checkpoint_path=str(p))):
        with pytest.raises(ValueError, match='not a checkpoint of Fast-iTPN.*its keys are: cls_token, pos_embed'):
            door(path)


def test_unknown_and_missing_native_keys_are_listed(native, tmp_path):
    weights = dict(native, surplus=torch.zeros(1))
    del weights['stages.0.blocks.0.norm.bias']
    with pytest.raises(ValueError, match='it lacks stages.0.blocks.0.norm.bias, and the model has no surplus'):
        load(save(weights, tmp_path / 'w.pt'))


def test_layer_scale_is_never_dropped(classifier, tmp_path):
    """Without it the weights are ruined; the fault that users reported most."""
    with pytest.raises(ValueError, match='The file has layer scale.*init_values=0.1'):
        load(save(classifier, tmp_path / 'w.pt'), init_values=0.)


SHARED = 'has the shape .* memory for a part|more than 8 times as large as what it stores'
SHAPE = 'has the shape|shapes or types of|in the checkpoint, but|tokens|but the model is of|not of an official iTPN'
VALUES = 'infinite or not a number'
ODD = {  # what is in the place of a tensor: how it is made of it, and what is said
    'scalar': (lambda t: torch.zeros(()), SHAPE),
    'empty': (lambda t: t[:0], SHAPE),
    'a dimension more': (lambda t: t[None], SHAPE),
    'one number': (lambda t: t.new_zeros([1] * t.ndim), SHAPE),
    'huge': (lambda t: torch.zeros(1).expand([2 ** (48 // t.ndim)] * t.ndim), SHARED),
    'sparse': (lambda t: t.to_sparse(), 'has the shape .* memory for a part'),
    'complex': (lambda t: t.to(torch.complex64), 'of torch.complex64, not of a floating-point type|types of'),
    'integers': (lambda t: t.to(torch.int64), 'of torch.int64, not of a floating-point type|types of'),
    'not a number': (lambda t: t.index_fill(0, torch.tensor(0), math.nan), VALUES),
    'infinite': (lambda t: t.index_fill(0, torch.tensor(0), math.inf), VALUES),
}
ODD_KEYS = {
    'fast_itpn_tiny': (
        'pos_embed', 'blocks.1.reduction.weight', 'patch_embed.proj.weight', 'blocks.5.attn.q_proj.weight'),
    'itpn_tiny': (
        'absolute_pos_embed', 'blocks.5.attn.qkv.weight', 'blocks.5.norm1.weight',
        'blocks.5.attn.relative_position_bias_table'),
}


@pytest.mark.parametrize('odd', list(ODD))
def test_odd_tensors_are_refused_in_one_sentence(odd, tmp_path):
    change, said = ODD[odd]
    for name, keys in ODD_KEYS.items():
        model = small_model(name)
        official = native_to_official(model.state_dict())
        for key in keys:
            weights = {**official, key: change(official[key])}
            for door in (functools.partial(checkpoint_filter_fn, model=model), model.load_state_dict):
                with pytest.raises(ValueError, match=said) as error:
                    door(weights)
                assert '\n' not in str(error.value)
        torch.save(weights, tmp_path / 'w.pt')
        facts = inspect(tmp_path / 'w.pt', name)  # which looks at shapes alone
        assert said != SHAPE or facts['problem'] or not facts['models'][0]['fits']
        with pytest.raises(ValueError):
            convert(tmp_path / 'w.pt', tmp_path / 'out', name)


def test_keys_and_metadata_of_any_kind_are_taken(tmp_path):
    model = small_model('fast_itpn_tiny')
    weights = {0: torch.ones(2), b'x': torch.ones(3), (1, ('a',)): {2: torch.ones(4)}, **model.state_dict()}
    assert checkpoint_filter_fn(weights, model).keys() == model.state_dict().keys()
    torch.save({(0, 'net'): weights, 7: {}, b'8': None}, tmp_path / 'w.pt')
    overlay = dict(file=str(tmp_path / 'w.pt'), num_classes=5)
    loaded = timm.create_model('fast_itpn_tiny', pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)
    assert torch.equal(loaded.head.fc.weight, model.head.fc.weight)
    assert inspect(tmp_path / 'w.pt')['layout'] == 'native'
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'w.safetensors', {'source_sha256': 'x'})
    revert(tmp_path / 'w.safetensors', tmp_path / 'official.pt')
    with pytest.raises(ValueError, match='is of Fast-iTPN .*, but the model is of iTPN .*: name another with'):
        convert(tmp_path / 'w.safetensors', tmp_path / 'out', 'itpn_tiny')


def test_native_weights_that_are_loaded_as_they_are_get_a_warning(caplog):
    """`load_state_dict` may be given anything on purpose."""
    model = small_model('fast_itpn_tiny')
    for odd in ('complex', 'integers', 'not a number', 'infinite'):
        weights = {'model.' + key: value for key, value in model.state_dict().items()}
        weights['model.head.fc.bias'] = ODD[odd][0](weights['model.head.fc.bias'])
        caplog.clear()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of torch, about complex numbers
            torch.nn.ModuleDict(dict(model=model)).load_state_dict(weights)
        assert re.search(f'cannot be right: head.fc.bias .*{ODD[odd][1]}', caplog.text)
        model.reset_classifier(5)


def test_missing_classifier_is_an_error_when_it_is_kept(native, tmp_path):
    weights = {key: value for key, value in native.items() if not key.startswith('head.fc')}
    with pytest.raises(RuntimeError, match='Missing key.*head.fc.weight'):
        load(save(weights, tmp_path / 'w.pt'))


@pytest.mark.parametrize('content, what', [
    (b'', 'is empty'), (b'<html>Virus scan warning', 'is a web page'),
    (as_bytes({'a': torch.zeros(9)})[:500], 'is truncated, damaged or not a weight file: get it again'),
    (as_bytes(torch.zeros(3)), 'holds a Tensor, not a dict of tensors'),
    (as_bytes({'args': argparse.Namespace()}), 'w.pt holds no tensors'),
])
def test_file_without_weights_is_named(content, what, tmp_path):
    (tmp_path / 'w.pt').write_bytes(content)
    with pytest.raises(ValueError, match=what) as error:
        load(tmp_path / 'w.pt')
    assert '\n' not in str(error.value)


class Config(dict):
    """As those of yacs, which the code of HiViT writes into every file."""


@pytest.mark.parametrize('zipped', [True, False])
def test_weights_need_nothing_but_tensors(zipped, classifier, reference, tmp_path):
    mark = tmp_path / 'mark'
    content = {
        'model': {**classifier, 'spy': Explosive(mark)}, 'best': np.float32(81.5), 'config': Config(a=1),
        'args': argparse.Namespace(lr=1), 'rate': fractions.Fraction(1, 3), 'bomb': Explosive(mark)}
    torch.save(content, tmp_path / 'w.pt', _use_new_zipfile_serialization=zipped)
    model = load(tmp_path / 'w.pt')
    assert_same(model, reference)
    assert not mark.exists() and not model.pretrained_cfg.get('state_dict')
    with pytest.raises(RuntimeError, match='weights_only=True blocked'):
        timm.create_model('fast_itpn_tiny', num_classes=1000, checkpoint_path=str(tmp_path / 'w.pt'))
    assert not mark.exists()


def test_published_configs_are_complete():
    names = timm.list_models(module='itpn', include_tags=True)
    tagged = {name for name in names if '.' in name}
    assert set(timm.list_models(module='itpn', pretrained=True)) == tagged
    assert {plain_name(name) for name in tagged} == set(SOURCES)
    for name in names:
        cfg = timm.get_pretrained_cfg(name)
        assert (cfg.num_classes in (0, 1000, 21841)) and (cfg.interpolation, cfg.crop_pct) == ('bicubic', 0.875)
        assert cfg.license == ('mit' if name.startswith('hivit_') and '.' in name else 'unknown')
        assert cfg.paper_ids == ('arXiv:2205.14949' if name.startswith('hivit') else 'arXiv:2211.12735')
        json.dumps(cfg.to_dict())
    for name in tagged:
        cfg, source = timm.get_pretrained_cfg(name), source_of(name)
        assert (cfg.hf_hub_id or '', cfg.hf_hub_filename or '') == (source.hub_repo, source.hub_path)
        assert cfg.url == (cfg.origin_url, file_name(name)) and source.drive_id in cfg.origin_url
        assert source.hub_path.endswith(source.file_name) or not source.hub_path
    on_hub = {name for name, source in SOURCES.items() if source.hub_repo == REPO}
    assert on_hub == {f'fast_itpn_{size}.mim_in1k' for size in ('tiny', 'base', 'large')}

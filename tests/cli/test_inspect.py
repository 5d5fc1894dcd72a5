"""What is in a checkpoint: true for files of this package and of others, harmless for hostile ones."""
import argparse
import hashlib
import json
import shlex

import pytest
import timm
import torch
from support import golden
from support.small import official_weights

from timm_itpn.cli import inspect as inspect_command
from timm_itpn.cli import main
from timm_itpn.tools.convert import convert
from timm_itpn.weights.sources import SOURCES

pytestmark = pytest.mark.usefixtures('one_thread')

TINY = 'fast_itpn_tiny.mim_in1k'


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The current folder."""
    monkeypatch.chdir(tmp_path)


def hollow(name):
    """Official weights with the true shapes; each has one number only, which the file repeats."""
    return {key: torch.zeros(1).half().expand(shape) for key, shape in golden.load(name)['keys']}


@pytest.fixture
def pretraining():
    return hollow('fast_itpn_tiny_mim')


def wrapped(weights, **more):
    """A checkpoint as training scripts save it."""
    optimizer = {'state': {0: {'exp_avg': torch.zeros(2)}}, 'param_groups': [{'lr': 1e-3}]}
    return {'model': weights, 'optimizer': optimizer, 'epoch': 3, 'args': argparse.Namespace(lr=1e-3), **more}


def inspect(content, capsys, *argv, path='w.pt'):
    """Facts from the JSON, with the table made of them, and the remark on stderr."""
    if content is not None:
        torch.save(content, path)
    assert main(['inspect', path, *argv, '--json']) == 0
    captured = capsys.readouterr()
    assert captured.out.isascii() and captured.err.replace('\n', '').isprintable()
    facts = json.loads(captured.out)
    table = inspect_command.table(facts)
    assert table.replace('\n', '').isprintable()
    return {**facts, 'table': table + '\n', 'remark': captured.err}


def error(capsys, *argv):
    assert main(['inspect', *argv]) == 1
    captured = capsys.readouterr()
    assert captured.out == '' and captured.err.count('\n') == 1
    return captured.err


# files of this package

def test_pretraining_file_is_told_whole(pretraining, capsys):
    facts = inspect(wrapped(pretraining), capsys)
    with open('w.pt', 'rb') as file:
        content = file.read()
    assert (facts['file'], facts['format'], facts['bytes']) == ('w.pt', 'zip pickle', len(content))
    assert facts['sha256'] == hashlib.sha256(content).hexdigest()
    assert facts['wrapper'] == 'model' and facts['layout'] == 'official'
    assert facts['others'] == {'optimizer': 'dict of 2 (tensors: 1)', 'epoch': '3', 'args': 'argparse.Namespace'}
    assert facts['globals'] == ['argparse.Namespace']
    assert facts['dtypes'] == {'float16': len(pretraining)} and facts['num_tensors'] == len(pretraining)
    assert facts['num_values'] == sum(facts['parts'].values()) == sum(v.numel() for v in pretraining.values())
    assert set(facts['parts']) == {
        'backbone', 'layer scale', 'pyramid', 'mask token', 'decoder', 'teacher head'}
    assert facts['network'] == dict(
        family='Fast-iTPN', embed_dim=384, depths=[1, 1, 12], in_chans=3, num_tokens=196, num_classes=0,
        pretraining=True, layer_scale=True, rel_pos_bias=False, pyramid_dim=256, pyramid_depth=1)
    assert facts['models'] == [dict(name=TINY, fits=True, args={}, problem='')] and facts['model'] == TINY
    assert facts['notes'] == []
    assert facts['remark'] == f'convert it with: timm-itpn convert w.pt --model {TINY} -o {TINY}\n'


def test_classifier_is_told_and_command_given_works(capsys):
    classifier = golden.official_state_dict(golden.load('fast_itpn_tiny'), torch.float16)
    facts = inspect({'module': {f'module.{key}': value for key, value in classifier.items()}}, capsys)
    assert facts['wrapper'] == 'module.module' and facts['network']['num_classes'] == 1000
    assert facts['models'] == [dict(name='fast_itpn_tiny', fits=True, args={'num_classes': 1000}, problem='')]
    assert 'fast_itpn_tiny with num_classes=1000\n' in facts['table']
    assert facts['globals'] == [] and facts['others'] == {}
    command = facts['remark'].rstrip('\n').partition('convert it with: timm-itpn ')[2]
    assert main(shlex.split(command)) == 0
    capsys.readouterr()
    folder = inspect(None, capsys, path='fast_itpn_tiny')
    assert folder['model'] == 'fast_itpn_tiny' and folder['layout'] == 'native'
    assert folder['remark'] == "load it with: timm.create_model('local-dir:fast_itpn_tiny', pretrained=True)\n"


@pytest.mark.parametrize(('name', 'model', 'args'), [
    ('itpn_base_mae', 'itpn_base.pixel_in1k', {}),
    ('itpn_base_clip', 'itpn_base', {'num_classes': 1000, 'init_values': 0.1}),
    ('fast_itpn_base_mim', 'fast_itpn_base.mim_in1k', {}),
    ('hivit_base', 'hivit_base.mae_in1k_ft_in1k', {}),
])
def test_models_of_both_families_are_recognised(name, model, args, capsys):
    facts = inspect(wrapped(hollow(name)), capsys)
    assert facts['models'] == [dict(name=model, fits=True, args=args, problem='')]


def test_model_with_the_arguments_told_loads_the_file(capsys):
    weights = golden.official_state_dict(golden.load('fast_itpn_tiny_mim'), torch.float16)
    weights = {key: value for key, value in weights.items() if 'gamma' not in key}
    weights['patch_embed.proj.weight'] = weights['patch_embed.proj.weight'][:, :1]
    weights['pos_embed'] = weights['pos_embed'][:, :16]
    facts = inspect({'model': weights}, capsys)
    model, = facts['models']
    assert model['args'] == {'img_size': [64, 64], 'in_chans': 1, 'init_values': 0.}
    loaded = timm.create_model(
        model['name'], pretrained=True, num_classes=0, **model['args'],
        pretrained_cfg_overlay=dict(file='w.pt', first_conv=None))
    assert torch.equal(loaded.stages[2].pos_embed, weights['pos_embed'].float())


def test_several_models_are_left_to_the_user(capsys):
    weights = timm.create_model('itpn_tiny', num_classes=3).state_dict()
    facts = inspect(weights, capsys)
    assert [model['name'] for model in facts['models']] == ['hivit_tiny', 'itpn_tiny'] and facts['model'] is None
    assert facts['layout'] == 'native' and facts['wrapper'] == '' and facts['others'] == {}
    assert facts['remark'] == 'choose a model with --model: hivit_tiny or itpn_tiny\n'
    facts = inspect(weights, capsys, '--model', 'itpn_tiny')
    assert facts['model'] == 'itpn_tiny' and 'timm-itpn convert w.pt --model itpn_tiny -o' in facts['remark']


def test_averaged_weights_are_pointed_out(pretraining, capsys):
    facts = inspect(wrapped(pretraining, model_ema=pretraining), capsys)
    assert facts['wrapper'] == 'model' and facts['num_tensors'] == len(pretraining)
    assert facts['others']['model_ema'] == f'dict of {len(pretraining)} (tensors: {len(pretraining)})'
    assert "averaged weights in model_ema: timm's loaders take those, convert does with --ema" in facts['notes']
    assert not any('averaged' in note for note in inspect(wrapped(pretraining, model_ema=None), capsys)['notes'])


def test_converted_folder_names_its_source(capsys, tmp_path, monkeypatch, small_models):
    torch.save({'model': official_weights(num_classes=0, pyramid=True)}, 'w.pt')
    convert(tmp_path / 'w.pt', tmp_path / 'out', TINY)
    facts = inspect(None, capsys, path='out')
    source = hashlib.sha256((tmp_path / 'w.pt').read_bytes()).hexdigest()
    assert facts['format'] == 'safetensors' and facts['file'] == 'out/model.safetensors'
    assert facts['metadata']['source_sha256'] == source and 'source: w.pt\n' in facts['table']
    assert f'says that it was converted from {source}, which was not checked: no SHA-256 is known' in facts['table']
    monkeypatch.setitem(SOURCES, TINY, SOURCES[TINY]._replace(sha256=source))
    assert f'which is the known SHA-256 of {TINY}\n' in inspect(None, capsys, path='out')['table']


@pytest.mark.parametrize(('tree', 'wrapper'), [
    (lambda w: {'net': {**{f'encoder.body.{key}': value for key, value in w.items()}, 'head.x': torch.zeros(2)}},
     'net.encoder.body'),
    (lambda w: {f'backbone.{key}': value for key, value in w.items()}, 'backbone'),
])
def test_network_under_a_prefix_is_told(tree, wrapper, pretraining, capsys):
    facts = inspect(tree(pretraining), capsys)
    assert facts['wrapper'] == wrapper and facts['model'] == TINY and f' {wrapper}\n' in facts['table']
    assert facts['others'] == ({'net.other tensors': '1'} if 'net' in wrapper else {})


# what does not fit

def test_named_model_that_does_not_fit_is_told(pretraining, capsys):
    facts = inspect({'model': pretraining}, capsys, '--model', 'fast_itpn_small')
    assert [(model['name'], model['fits']) for model in facts['models']] == [(TINY, True), ('fast_itpn_small', False)]
    assert 'depths [1, 1, 12] and embed_dim 384, but the model is of' in facts['models'][1]['problem']
    assert facts['remark'] == ''


@pytest.mark.parametrize(('change', 'problem'), [
    (lambda w: w.pop('blocks.0.norm2.bias'), 'it lacks stages.0.blocks.0.norm.bias'),
    (lambda w: w.update(pos_embed=torch.zeros(1, 35, 384)), '35 tokens, which'),
    (lambda w: w.update(pos_embed=torch.zeros(7, 196, 384)), 'stages.2.pos_embed is (7, 196, 384) in the checkpoint'),
])
def test_nearly_fitting_weights_are_told(change, problem, capsys):
    weights = hollow('fast_itpn_tiny_mim')
    change(weights)
    facts = inspect({'model': weights}, capsys)
    model, = facts['models']
    assert not model['fits'] and problem in model['problem']
    assert facts['network']['family'] == 'Fast-iTPN' and facts['model'] is None and facts['remark'] == ''


@pytest.mark.parametrize(('change', 'problem'), [
    (lambda w: w.pop('pos_embed'), 'has no stages.2.pos_embed'),
    (lambda w: w.update(pos_embed=torch.zeros(())), 'stages.2.pos_embed has the shape [], but needs 3 dimensions'),
    (lambda w: w.update(surplus=torch.zeros(1)), 'keys that are not of an official Fast-iTPN: surplus'),
    (lambda w: w.update({f'blocks.{10 ** 12}.x': torch.zeros(1)}), f'Fast-iTPN: blocks.{10 ** 12}.x'),
])
def test_broken_weights_are_told(change, problem, capsys):
    weights = hollow('fast_itpn_tiny_mim')
    change(weights)
    facts = inspect({'model': weights}, capsys)
    assert problem in facts['problem'] and facts['models'] == [] and facts['network'] is None


def test_checkpoint_of_another_model_is_listed(capsys):
    vit = timm.create_model('vit_tiny_patch16_224').state_dict()
    facts = inspect({'state_dict': vit, 'epoch': 1}, capsys)
    assert facts['num_tensors'] == len(vit) and facts['dtypes'] == {'float32': len(vit)}
    assert facts['first_keys'] == list(vit)[:8] and 'cls_token\n' in facts['table']
    assert facts['problem'] == 'It fits no model of this package.' and facts['layout'] == '' and facts['remark'] == ''


@pytest.mark.parametrize(('content', 'others'), [
    ([torch.zeros(3)], {'whole file': 'list of 1 (tensors: 1)'}),
    ({0: torch.zeros(3), 'n': 10 ** 9000}, {'0': 'tensor [3] of float32', 'n': 'integer of 29898 bits'}),
    ({}, {}),
])
def test_file_without_a_state_dict_is_listed(content, others, capsys):
    facts = inspect(content, capsys)
    problem = 'not a dict of tensors' if isinstance(content, list) else 'It holds no named tensors.'
    assert facts['others'] == others and problem in facts['problem']


# hostile and broken files

EVIL = '\x1b]0;owned\x07\r\u202e\n\x9b2J'


@pytest.mark.parametrize('layout', ['official', 'other', 'nested'])
def test_control_characters_are_escaped(layout, capsys):
    tensors = {'official': hollow('fast_itpn_tiny_mim'), 'other': {}, 'nested': {}}[layout]
    content = {**tensors, EVIL: torch.zeros(1)}
    if layout == 'nested':
        content = {'model': content, EVIL: EVIL, 'x\ud800': 'x\ud800'}
    facts = inspect(content, capsys)  # looks at the table
    assert r'\x1b]0;owned\x07\r\u202e\n\x9b2J' in facts['table']
    if layout == 'nested':
        assert facts['others'] == {EVIL: EVIL, 'x\ud800': 'x\ud800'}


@pytest.mark.parametrize(('content', 'message'), [
    (b'<!DOCTYPE html><html>', 'is a web page, not a weight file'), (b'PK\x03\x04 cut', 'not a weight file')])
def test_unreadable_file_is_one_sentence(content, message, capsys, tmp_path):
    (tmp_path / 'w.pt').write_bytes(content)
    assert message in error(capsys, 'w.pt') and message in error(capsys, 'w.pt', '--json')


def test_wrong_arguments_are_one_sentence(capsys, tmp_path):
    assert "No such file or directory: 'absent.pt'" in error(capsys, 'absent.pt')
    assert 'No such file or directory' in error(capsys, str(tmp_path))
    assert "there is no model 'resnet18'" in error(capsys, 'w.pt', '--model', 'resnet18')
    assert "there is no model 'itpn_tiny.x'" in error(capsys, 'w.pt', '--model', 'itpn_tiny.x')


# hashes

def test_hash_is_compared_with_the_known_ones(pretraining, monkeypatch, capsys):
    facts = inspect({'model': pretraining}, capsys)
    assert f'was not checked: no SHA-256 is known of {TINY}\n' in facts['table']
    for name in (TINY, 'hivit_base.mae_in1k'):
        with monkeypatch.context() as patch:
            patch.setitem(SOURCES, name, SOURCES[name]._replace(sha256=facts['sha256']))
            assert f'is the known SHA-256 of {name}\n' in inspect(None, capsys)['table']
    monkeypatch.setitem(SOURCES, TINY, SOURCES[TINY]._replace(sha256='0' * 64))
    facts = inspect(None, capsys)
    assert f'is not the known one of {TINY}, {"0" * 64}\n' in facts['table']

"""The network is found wherever it is in a checkpoint, and one that cannot be told is asked for."""
import argparse

import pytest
import torch
from support import golden

from timm_itpn.weights.checkpoint import to_native, unwrap
from timm_itpn.weights.layout import find_prefixes, official_to_native

OFFICIAL = {key: torch.empty(shape, device='meta') for key, shape in golden.load('fast_itpn_tiny')['keys']}
NATIVE = official_to_native(OFFICIAL)
HEAD = {'box_head.weight': torch.zeros(1), 'blocks.0.reduction.weight': torch.zeros(1)}


def under(prefix, weights=OFFICIAL):
    return {f'{prefix}.{key}': value for key, value in weights.items()}


WHERE = {  # checkpoint: where the network is in it
    '': OFFICIAL,
    'module': under('module'),
    'backbone': {**under('backbone'), **HEAD},
    'model': {'model': OFFICIAL, 'epoch': 3, 'args': argparse.Namespace()},
    'net': {'net': OFFICIAL, 'optimizer': {'state': {0: {'exp_avg': torch.zeros(1)}}, 'param_groups': []}},
    'net.encoder.body': {'net': {**under('encoder.body'), **HEAD}},
    'state_dict.backbone': {'state_dict': {**under('backbone'), 'step': 3}, 'meta': {'mmdet_version': '2'}},
    'checkpoint.state_dict.module': {'checkpoint': {'state_dict': under('module'), 'iter': 7}},
    'model_ema': {'model': OFFICIAL, 'model_ema': OFFICIAL},
    'state_dict_ema.module': {'state_dict': OFFICIAL, 'state_dict_ema': under('module')},
    'a.b.c.d.e': {'a': {'b': {'c': {'d': {'e': OFFICIAL}}}}},
}


@pytest.mark.parametrize('layout', ['official', 'native'])
@pytest.mark.parametrize('path', WHERE)
def test_network_is_found_and_named(path, layout):
    def convert(tree):
        if 'pos_embed' in tree:
            return NATIVE
        inner = next((key[:-len('pos_embed')] for key in tree if str(key).endswith('.pos_embed')), '')
        if inner:
            others = {key: value for key, value in tree.items() if not key.startswith(inner)}
            return {**others, **under(inner.rstrip('.'), NATIVE)}
        return {key: convert(value) if isinstance(value, dict) else value for key, value in tree.items()}

    checkpoint = WHERE[path] if layout == 'official' else convert(WHERE[path])
    state_dict, found = unwrap(checkpoint)
    assert found == path and list(state_dict) == list(OFFICIAL if layout == 'official' else NATIVE)
    assert set(to_native(checkpoint)) == set(to_native(checkpoint, prefix=path)) == set(NATIVE)


@pytest.mark.parametrize('checkpoint', [
    {**under('student'), **under('teacher', NATIVE)}, {'student': OFFICIAL, 'teacher': under('teacher', NATIVE)}])
def test_several_networks_are_listed_and_prefix_chooses(checkpoint):
    with pytest.raises(ValueError, match='has 2 networks, under .*: choose one with .*--prefix`.*prefix=') as error:
        to_native(checkpoint)
    assert "'student'" in str(error.value) and "teacher'" in str(error.value)
    assert to_native(checkpoint, prefix='student').keys() == NATIVE.keys()
    assert to_native(checkpoint, prefix='teacher.').keys() == NATIVE.keys()
    with pytest.raises(ValueError, match="no network under the prefix 'tea', only under: .*teacher'"):
        to_native(checkpoint, prefix='tea')


def test_network_in_a_network_is_told_apart():
    checkpoint = {**OFFICIAL, **under('teacher')}
    assert to_native(checkpoint, prefix='').keys() == to_native(checkpoint, prefix='teacher').keys() == NATIVE.keys()


def test_averaged_or_plain_weights_are_preferred_as_asked():
    assert unwrap({'model': OFFICIAL, 'model_ema': under('module')}, averaged=True)[1] == 'model_ema.module'
    assert unwrap({'model': OFFICIAL, 'model_ema': OFFICIAL}, averaged=False)[1] == 'model'
    assert unwrap({'model': OFFICIAL, 'model_ema': {'epoch': 1}}, averaged=True)[1] == 'model'


@pytest.mark.parametrize('content, message', [
    ([torch.zeros(3)], 'it holds a list, not a dict of tensors'),
    ({'model': {3: torch.zeros(1)}}, 'it holds no tensors'),
    ({'state_dict': {'cls_token': torch.zeros(1), 'pos_embed': torch.zeros(1)}}, 'its keys are: cls_token, pos_embed'),
    ({'stages.2.pos_embed': 'text', 'stages.0.x': torch.zeros(1)}, 'its keys are: stages.0.x'),
    ({}, 'it holds no tensors'),
])
def test_other_contents_are_refused_and_named(content, message):
    with pytest.raises(ValueError, match=f'This is not a checkpoint.*: {message}'):
        to_native(content)


def test_dict_that_holds_itself_ends():
    knot = {'epoch': 1}
    knot['model'] = knot
    with pytest.raises(ValueError, match='This is not a checkpoint'):
        to_native(knot)


def test_prefixes_are_those_of_whole_networks():
    keys = [*under('a'), *under('b.c', NATIVE), *NATIVE, *HEAD, 'd.blocks.1.reduction.weight', 'xstages.2.pos_embed']
    assert sorted(find_prefixes(keys)) == ['', 'a.', 'b.c.']

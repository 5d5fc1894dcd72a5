"""The key tables of official and native names."""
import pytest
import timm
import torch
from support import golden

from timm_itpn.weights.layout import (
    FAST_ITPN,
    ITPN,
    PRETRAIN,
    key_table,
    layout_of,
    native_depths,
    native_layout,
    native_pyramid_depth,
    native_to_official,
    official_to_native,
    pretraining_part,
)

CASES = {  # golden: model with the same parameters, table
    'fast_itpn_tiny': ('fast_itpn_tiny', (FAST_ITPN, (1, 1, 12))),
    'fast_itpn_small': ('fast_itpn_small', (FAST_ITPN, (2, 2, 20))),
    'fast_itpn_base': ('fast_itpn_base', (FAST_ITPN, (3, 3, 24))),
    'fast_itpn_large': ('fast_itpn_large', (FAST_ITPN, (2, 2, 40))),
    'itpn_base_clip': ('itpn_base.clip_in1k', (ITPN, (3, 3, 24))),
    'itpn_large_pixel': ('itpn_large', (ITPN, (2, 2, 40))),
    'hivit_base': ('hivit_base', (ITPN, (4, 4, 20))),
}
PRETRAINING = {  # golden: table, parts of pre-training
    'fast_itpn_tiny_mim': ((FAST_ITPN, (1, 1, 12), 1), ('mask token', 'decoder', 'teacher head')),
    'fast_itpn_base_mim': ((FAST_ITPN, (3, 3, 24), 1), ('mask token', 'decoder', 'teacher head')),
    'itpn_base_pyramid': ((ITPN, (3, 3, 24), 1), ()),
    'itpn_base_mae': ((ITPN, (3, 3, 24), 2), ('mask token', 'decoder')),
    'itpn_base_clip_distill': ((ITPN, (3, 3, 24), 1), ('mask token', 'decoder', 'teacher head', 'auxiliary branch')),
}
OPTIONAL = ('.gamma', 'relative_position_bias_table')  # not in every official file of iTPN


def on_meta(name):
    return {key: torch.empty(shape, device='meta') for key, shape in golden.load(name)['keys']}


@pytest.mark.parametrize('name', CASES)
def test_table_pairs_every_official_key_with_every_native_one(name):
    model_name, args = CASES[name]
    table = key_table(*args)
    sources = [source for row in table.values() for source in row]
    assert len(sources) == len(set(sources))
    official = {key for key, _ in golden.load(name)['keys']}
    assert official <= set(sources)
    assert all(source.endswith(('gamma_1', 'gamma_2')) for source in set(sources) - official)
    model = timm.create_model(model_name, num_classes=10, device='meta')
    keys = set(model.state_dict())
    assert keys <= set(table) and all(key.endswith('.gamma') for key in set(table) - keys)


@pytest.mark.parametrize('name', PRETRAINING)
def test_pretraining_file_gives_backbone_pyramid_and_the_rest_by_its_own_name(name):
    args, parts = PRETRAINING[name]
    official = on_meta(name)
    native = official_to_native(official)
    rest = {key.removeprefix(PRETRAIN) for key in native if key.startswith(PRETRAIN)}
    assert rest <= set(official)
    assert {pretraining_part(key, args[0]) for key in rest} == set(parts)
    wanted = {key for key in key_table(*args) if not key.startswith('head.')}
    found = {key for key in native if not key.startswith(PRETRAIN)}
    assert found <= wanted and all(key.endswith(OPTIONAL) for key in wanted - found)
    assert (native_layout(native), native_depths(native), native_pyramid_depth(native)) == (
        args if len(args) == 3 else (*args, 0))


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32])
@pytest.mark.parametrize('name', ['fast_itpn_tiny', 'fast_itpn_tiny_mim', 'itpn_base_mae', 'itpn_base_clip_distill'])
def test_there_and_back_is_the_same_to_the_bit(name, dtype):
    official = golden.official_state_dict(golden.load(name), dtype)
    native = official_to_native(official)
    back = native_to_official(native)
    assert (layout_of(native), layout_of(back)) == ('native', 'official')
    assert set(back) == set(official)
    for key, value in official.items():
        assert back[key].dtype == dtype and torch.equal(back[key], value), key


@pytest.mark.parametrize('name', [*CASES, *PRETRAINING])
def test_shapes_come_back(name):
    official = on_meta(name)
    back = native_to_official(official_to_native(official))
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in official.items()}


def test_unknown_native_keys_are_listed():
    native = official_to_native(on_meta('fast_itpn_tiny'))
    native['stages.2.blocks.0.rope'] = torch.empty(1)
    with pytest.raises(ValueError, match=r'not of a native Fast-iTPN: stages\.2\.blocks\.0\.rope\.'):
        native_to_official(native)


@pytest.mark.parametrize('name, family', [('fast_itpn_tiny', 'Fast-iTPN'), ('hivit_base', 'iTPN')])
def test_unknown_keys_are_listed(name, family):
    official = on_meta(name)
    official['blocks.4.attn.inner_attn_ln.weight'] = official['rope.freqs'] = torch.empty(1)
    message = rf'not of an official {family}: blocks\.4\.attn\.inner_attn_ln\.weight, rope\.freqs\.'
    with pytest.raises(ValueError, match=message):
        official_to_native(official)


def test_missing_part_of_a_packed_tensor_is_named():
    official = on_meta('fast_itpn_tiny')
    del official['blocks.4.attn.k_proj.weight']
    with pytest.raises(ValueError, match=r'incomplete: it has .* but not blocks\.4\.attn\.k_proj\.weight\.'):
        official_to_native(official)


def test_other_models_are_not_taken_for_official_files():
    for name in ('vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224', 'fast_itpn_tiny', 'itpn_tiny'):
        assert layout_of(timm.create_model(name, device='meta').state_dict()) != 'official'

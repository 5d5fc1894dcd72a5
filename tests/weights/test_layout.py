"""The key tables of official and native names."""
import golden
import pytest
import timm
import torch

from timm_itpn.weights.layout import FAST_ITPN, ITPN, is_official, key_table, native_family, official_to_native

CASES = {  # golden: model with the same parameters, table
    'fast_itpn_tiny': ('fast_itpn_tiny', (FAST_ITPN, (1, 1, 12))),
    'fast_itpn_small': ('fast_itpn_small', (FAST_ITPN, (2, 2, 20))),
    'fast_itpn_base': ('fast_itpn_base', (FAST_ITPN, (3, 3, 24))),
    'fast_itpn_large': ('fast_itpn_large', (FAST_ITPN, (2, 2, 40))),
    'itpn_base_clip': ('itpn_base.clip_in1k', (ITPN, (3, 3, 24))),
    'itpn_large_pixel': ('itpn_large', (ITPN, (2, 2, 40))),
    'hivit_base': ('hivit_base', (ITPN, (4, 4, 20))),
}
PRETRAINING = {  # golden: table, parts left out
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
def test_pretraining_file_gives_backbone_and_pyramid_and_says_what_is_left_out(name, caplog):
    args, parts = PRETRAINING[name]
    with caplog.at_level('INFO'):
        native = official_to_native(on_meta(name))
    wanted = {key for key in key_table(*args) if not key.startswith('head.')}
    assert set(native) <= wanted and all(key.endswith(OPTIONAL) for key in wanted - set(native))
    for part in parts:
        assert part in caplog.text
    assert bool(parts) == ('Left out' in caplog.text)
    assert native_family(native) == args[0].family


def test_index_buffers_of_official_files_are_dropped():
    official = on_meta('itpn_base_pixel')
    expected = official_to_native(official)
    for key in list(official):
        if key.endswith('relative_position_bias_table'):
            official[key.replace('bias_table', 'index')] = torch.empty(196, 196, device='meta')
    official['relative_position_index'] = torch.empty(196, 196, device='meta')
    assert set(official_to_native(official)) == set(expected)


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
        assert not is_official(timm.create_model(name, device='meta').state_dict())

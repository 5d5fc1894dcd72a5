"""The key table of official and native names."""
import golden
import pytest
import timm
import torch

from timm_itpn.weights.layout import PRETRAINING_PARTS, is_official, key_table, official_to_native

DEPTHS = {'tiny': (1, 1, 12), 'small': (2, 2, 20), 'base': (3, 3, 24), 'large': (2, 2, 40)}


def on_meta(name):
    return {key: torch.empty(shape, device='meta') for key, shape in golden.load(name)['keys']}


@pytest.mark.parametrize('variant', DEPTHS)
def test_table_pairs_every_official_key_with_every_native_one(variant):
    table = key_table(DEPTHS[variant])
    sources = [source for row in table.values() for source in row]
    assert len(sources) == len(set(sources))
    assert set(sources) == {key for key, _ in golden.load(f'fast_itpn_{variant}')['keys']}
    model = timm.create_model(f'fast_itpn_{variant}', num_classes=10, device='meta')
    assert set(table) == set(model.state_dict())


@pytest.mark.parametrize('variant', ['tiny', 'base'])
def test_pretraining_file_gives_the_backbone_and_says_what_is_left_out(variant, caplog):
    official = on_meta(f'fast_itpn_{variant}_mim')
    with caplog.at_level('INFO'):
        native = official_to_native(official)
    assert set(native) == {key for key in key_table(DEPTHS[variant]) if not key.startswith('head.')}
    for part in set(PRETRAINING_PARTS.values()):
        assert part in caplog.text


def test_unknown_keys_are_listed():
    official = on_meta('fast_itpn_tiny')
    official['blocks.4.attn.inner_attn_ln.weight'] = official['rope.freqs'] = torch.empty(1)
    with pytest.raises(ValueError, match=r'not of a Fast-iTPN: blocks\.4\.attn\.inner_attn_ln\.weight, rope\.freqs\.'):
        official_to_native(official)


def test_missing_part_of_a_packed_tensor_is_named():
    official = on_meta('fast_itpn_tiny')
    del official['blocks.4.attn.k_proj.weight']
    with pytest.raises(ValueError, match=r'incomplete: it has .* but not blocks\.4\.attn\.k_proj\.weight\.'):
        official_to_native(official)


def test_other_models_are_not_taken_for_official_files():
    vit = timm.create_model('vit_tiny_patch16_224', device='meta').state_dict()
    native = timm.create_model('fast_itpn_tiny', device='meta').state_dict()
    assert not is_official(vit) and not is_official(native)

"""Weight files of iTPN and HiViT: what the two kinds of pre-training leave out, and other grids."""
import pytest
import timm
import torch
from support.small import SMALL, images, reduce_models, small_model
from timm.layers import resize_rel_pos_bias_table

from timm_itpn.weights.layout import ITPN, key_table

TABLE = 'attn.relative_position_bias_table'


def official(model, drop=()):
    """Official state dict of a small iTPN; nothing is packed in this family, so it is a change of names."""
    table = key_table(ITPN, SMALL['depths'], pyramid_depth=1)
    state_dict = {table[key][0]: value.clone() for key, value in model.state_dict().items()}
    return {key: value for key, value in state_dict.items() if not key.endswith(drop)} if drop else state_dict


def load(state_dict, path, name='itpn_tiny', cfg_classes=5, **kwargs):
    torch.save({'model': state_dict}, path)
    overlay = dict(file=str(path), num_classes=cfg_classes, input_size=(3, 64, 64))
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, **kwargs}).eval()


@pytest.fixture
def model():
    return small_model('itpn_tiny')


@pytest.mark.parametrize('size', [64, 96])
def test_pixel_pretraining_starts_the_bias_at_zero_and_says_so(size, model, tmp_path, caplog):
    pretraining = official(model, drop=(TABLE, 'fc_norm.weight', 'fc_norm.bias', 'head.weight', 'head.bias'))
    pretraining.update({'mask_token': torch.zeros(1, 1, 128), 'decoder_pos_embed': torch.zeros(1, 16, 512)})
    with caplog.at_level('INFO'):
        loaded = load(pretraining, tmp_path / 'w.pt', cfg_classes=0, img_size=size)
    assert 'no relative position bias: the tables start at zero' in caplog.text
    assert 'Left out 2 tensors that only pre-training needs (decoder, mask token)' in caplog.text
    for key, value in loaded.state_dict().items():
        if key.endswith('relative_position_bias_table'):
            assert (value == 0).all()
        elif not key.startswith('head') and not (size != 64 and key.endswith('pos_embed')):
            assert torch.equal(value, model.state_dict()[key]), key


@pytest.mark.parametrize('option, with_it, without, in_file', [
    ('init_values', 0.1, 0, True), ('init_values', 0.1, 0, False), ('rel_pos_bias', True, False, False)])
def test_layer_scale_is_never_dropped_nor_layer_scale_and_bias_made_up(option, with_it, without, in_file, tmp_path):
    fits, fits_not = (with_it, without) if in_file else (without, with_it)
    weights = official(small_model('itpn_tiny', **{option: fits}))
    message = r'the model has no .* The file has .*' if in_file else r'it lacks .* The file has no .*'
    with pytest.raises(ValueError, match=f'{message} with {option}={fits}'):
        load(weights, tmp_path / 'w.pt', **{option: fits_not})
    load(weights, tmp_path / 'w.pt', **{option: fits})


def test_bias_is_left_out_where_the_model_is_asked_to_have_none(model, tmp_path, caplog):
    with caplog.at_level('INFO'):
        loaded = load(official(model), tmp_path / 'w.pt', rel_pos_bias=False)
    assert 'Left out the relative position bias: the model has none (rel_pos_bias=False).' in caplog.messages
    assert {*model.state_dict()} - {*loaded.state_dict()} == {
        key for key in model.state_dict() if key.endswith('relative_position_bias_table')}


@pytest.mark.parametrize('size', [(96, 96), (48, 112)])
def test_tables_are_resized_for_another_grid(size, model, tmp_path):
    loaded = load(official(model), tmp_path / 'w.pt', img_size=size)
    grid = (size[0] // 16, size[1] // 16)
    shape = ((2 * grid[0] - 1) * (2 * grid[1] - 1), 2)
    for ours, theirs in zip(loaded.stages[2].blocks, model.stages[2].blocks):
        table = theirs.rel_pos_bias.relative_position_bias_table
        torch.testing.assert_close(
            ours.rel_pos_bias.relative_position_bias_table,
            resize_rel_pos_bias_table(table, grid, shape, (4, 4)),
            rtol=1e-5,
            atol=1e-5,
        )
    model.set_input_size(size)
    x = images(1, 3, *size)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), model(x))


def test_table_that_does_not_fit_its_grid_is_named(model, tmp_path):
    weights = official(model)
    weights[f'blocks.6.{TABLE}'] = torch.zeros(50, 2)
    with pytest.raises(ValueError, match='relative_position_bias_table has 50 rows, the position embedding 4 x 4 tok'):
        load(weights, tmp_path / 'w.pt', img_size=96)


def test_other_family_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r'is of iTPN with depths \[1, 2, 2\].* but the model is of Fast-iTPN with'):
        load(official(model), tmp_path / 'w.pt', name='fast_itpn_tiny')
    fast = small_model('fast_itpn_tiny').state_dict()
    with pytest.raises(ValueError, match=r'is of Fast-iTPN with depths \[1, 2, 2\].* but the model is of iTPN with'):
        load(fast, tmp_path / 'w.pt')


def test_checkpoint_path_takes_official_files(model, tmp_path):
    torch.save({'model': official(model)}, tmp_path / 'w.pt')
    loaded = timm.create_model('itpn_tiny', checkpoint_path=str(tmp_path / 'w.pt'), **SMALL).eval()
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))


def test_the_published_classifier_loads_with_its_classes(tmp_path, monkeypatch):
    """hivit_base.mae_in1k_ft_in1k: 1000 classes are kept, others start new."""
    reduce_models(['hivit_base'], monkeypatch)
    model = small_model('hivit_base', num_classes=1000)
    torch.save({'model': official(model)}, tmp_path / 'w.pt')
    for num_classes in (1000, 7):
        loaded = timm.create_model(
            'hivit_base', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'w.pt')),
            num_classes=num_classes, img_size=64)
        assert torch.equal(loaded.head.fc.weight, model.head.fc.weight) == (num_classes == 1000)
        assert torch.equal(loaded.head.norm.weight, model.head.norm.weight)

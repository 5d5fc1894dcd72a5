"""The iTPN and HiViT models: their values, and what only they have."""
import copy

import numpy as np
import pytest
import timm
import torch
from support import golden
from support.small import drop_path_rates, images, optimizer_scales, small_model
from timm.layers import set_fused_attn
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2

GOLDENS = {  # golden: model
    'itpn_base_clip': 'itpn_base.clip_in1k',
    'itpn_base_pixel': 'itpn_base.pixel_in1k',
    'itpn_large_pixel': 'itpn_large.pixel_in1k',
    'hivit_base': 'hivit_base.mae_in1k_ft_in1k',
}
PARAMS = {  # with relative position bias; without layer scale but for the CLIP tags
    'itpn_tiny': 19_181_668,
    'itpn_small': 37_526_464,
    'itpn_base': 78_557_992,
    'itpn_base.clip_in1k': 78_583_720,
    'itpn_large': 288_493_576,
    'itpn_large.clip_in1k': 288_556_168,
    'hivit_base': 66_418_952,
}


def fill_by_hand(model, official):
    """Copy official tensors into a native model, module by module: independent of the package's own key table."""
    number = 0

    def copy_module(module, name):
        for leaf, parameter in module.named_parameters(recurse=False):
            parameter.data.copy_(official.pop(f'{name}.{leaf}'))

    def copy_gamma(layer_scale, name):
        for parameter in layer_scale.parameters():
            parameter.data.copy_(official.pop(name))

    for leaf in ('proj', 'norm'):
        copy_module(getattr(model.patch_embed, leaf), f'patch_embed.{leaf}')
    model.stages[2].pos_embed.data.copy_(official.pop('absolute_pos_embed'))
    for index, stage in enumerate(model.stages):
        if index > 0:
            copy_module(stage.downsample.norm, f'blocks.{number}.norm')
            copy_module(stage.downsample.reduction, f'blocks.{number}.reduction')
            number += 1
        for block in stage.blocks:
            name = f'blocks.{number}'
            number += 1
            copy_module(block.mlp.fc1, f'{name}.mlp.fc1')
            copy_module(block.mlp.fc2, f'{name}.mlp.fc2')
            if index < 2:
                copy_module(block.norm, f'{name}.norm2')
                copy_gamma(block.ls, f'{name}.gamma_2')
                continue
            copy_module(block.norm1, f'{name}.norm1')
            copy_module(block.norm2, f'{name}.norm2')
            copy_module(block.attn.qkv, f'{name}.attn.qkv')
            copy_module(block.attn.proj, f'{name}.attn.proj')
            copy_module(block.rel_pos_bias, f'{name}.attn')
            copy_gamma(block.ls1, f'{name}.gamma_1')
            copy_gamma(block.ls2, f'{name}.gamma_2')
    copy_module(model.head.norm, 'fc_norm')
    copy_module(model.head.fc, 'head')
    assert not official


@pytest.mark.parametrize('fused', [0, 1], ids=['plain', 'fused'])
@pytest.mark.parametrize('construction', ['native', 'official_file'])
@pytest.mark.parametrize('name', GOLDENS)
def test_golden_values_hold(name, construction, fused, tmp_path):
    expected = golden.load(name)
    official = golden.official_state_dict(expected)
    set_fused_attn(fused == 1)
    try:
        if construction == 'native':
            model = timm.create_model(GOLDENS[name], num_classes=1000, dtype=torch.float64)
            fill_by_hand(model, official)
        else:
            torch.save({'model': official}, tmp_path / 'official.pt')
            overlay = dict(file=str(tmp_path / 'official.pt'), num_classes=1000)
            model = timm.create_model(
                GOLDENS[name], pretrained=True, pretrained_cfg_overlay=overlay, dtype=torch.float64)
            (tmp_path / 'official.pt').unlink()
    finally:
        set_fused_attn(True)
    model.eval()
    for dtype, bound in ((torch.float64, 5e-6), (torch.float32, 1e-4)):
        model.to(dtype)
        with torch.inference_mode():
            final, features = model.forward_intermediates(golden.image(expected, dtype))
            logits = model.forward_head(final)
        assert golden.error(logits, expected['logits']) < bound
        if 'features' in expected:
            assert golden.error(features[2], expected['features']['stride16']) < bound


@pytest.mark.parametrize('name', PARAMS)
def test_parameter_count_is_the_published_one(name):
    model = timm.create_model(name, num_classes=1000, device='meta')
    assert sum(p.numel() for p in model.parameters()) == PARAMS[name]


@pytest.mark.parametrize('official, name', [
    ('itpn_base_3324_patch16_224', 'itpn_base'),
    ('itpn_large_2240_patch16_224', 'itpn_large'),
    ('itpn_large_2240_patch16_256', 'itpn_large'),
])
def test_official_name_creates_the_model(official, name):
    with pytest.warns(UserWarning, match=f'{official} to current {name}'):
        model = timm.create_model(official, device='meta')
    assert model.pretrained_cfg['architecture'] == name


# what a tag decides

@pytest.mark.parametrize('name, layer_scale, pyramid_depth', [
    ('itpn_base_fpn', False, 2),
    ('itpn_base_fpn.pixel_in1k', False, 2),
    ('itpn_base_fpn.clip_in1k', True, 1),
    ('itpn_tiny_fpn', False, 1),
])
def test_tag_decides_layer_scale_and_depth_of_the_pyramid(name, layer_scale, pyramid_depth):
    model = timm.create_model(name, pyramid=True, device='meta')
    keys = set(model.state_dict())
    for key in ('stages.0.blocks.0.ls.gamma', 'stages.2.blocks.0.ls1.gamma', 'stages.2.blocks.0.ls2.gamma'):
        assert (key in keys) == layer_scale
    assert [len(level.blocks) for level in model.pyramid.levels] == [pyramid_depth, pyramid_depth, 0]
    assert not any('.ls.' in key for key in keys if key.startswith('pyramid'))


def test_arguments_go_before_the_tag():
    model = timm.create_model('itpn_base.clip_in1k', init_values=0, device='meta')
    assert not any(key.endswith('gamma') for key in model.state_dict())


@pytest.mark.parametrize('tag', ['pixel_in1k', 'clip_in1k'])
def test_saved_model_comes_back_with_what_its_tag_decided(tag, tmp_path):
    small = dict(embed_dim=128, depths=(1, 1, 2), num_heads=2, img_size=32, num_classes=5)
    model = timm.create_model(f'itpn_base.{tag}', **small).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_for_hf(model, tmp_path)
    restored = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = images(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(restored(x), model(x))


# relative position bias

def test_without_bias_is_as_with_a_table_of_zeros():
    model = small_model('itpn_tiny')
    for block in model.stages[2].blocks:
        torch.nn.init.zeros_(block.rel_pos_bias.relative_position_bias_table)
    without = small_model('itpn_tiny', rel_pos_bias=False)
    without.load_state_dict(model.state_dict(), strict=False)  # the tables are too many
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), without(x))


@pytest.mark.parametrize('size', [(224, 224), (384, 384), (96, 160)])
def test_fused_and_plain_models_agree_in_value_and_gradient_of_the_tables(size):
    """Float64, through the whole model; in float32 they may differ twice as much as plain maths does from float64."""
    x = images(1, 3, *size, dtype=torch.float64)
    results = {}
    for fused in (False, True):
        set_fused_attn(fused)
        try:
            model = small_model('itpn_tiny', depths=(1, 1, 2), img_size=size, dtype=torch.float64)
        finally:
            set_fused_attn(True)
        for dtype in (torch.float64, torch.float32):
            twin = copy.deepcopy(model).to(dtype)
            logits = twin(x.to(dtype))
            logits.sum().backward()
            tables = [block.rel_pos_bias.relative_position_bias_table.grad for block in twin.stages[2].blocks]
            assert all(table.abs().sum() > 0 for table in tables)
            results[fused, dtype] = [value.detach().double() for value in (logits, *tables)]
    exact = results[False, torch.float64]
    for i, wanted in enumerate(exact):
        torch.testing.assert_close(results[True, torch.float64][i], wanted)
        eager_error = (results[False, torch.float32][i] - wanted).abs().max()
        scale = wanted.abs().max()
        assert (results[True, torch.float32][i] - wanted).abs().max() <= 2 * eager_error + 1e-6 * scale


def test_kept_bias_does_not_outlive_a_training_step():
    model = small_model('itpn_tiny')
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        assert torch.equal(model(x), before)
    optimizer = create_optimizer_v2(model, opt='sgd', lr=1.)
    model.train()
    model(x).square().sum().backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        after = model(x)
        fresh = copy.deepcopy(model)(x)
    assert torch.equal(after, fresh) and not torch.equal(after, before)


# training

def test_stochastic_depth_grows_linearly_over_the_blocks():
    model = timm.create_model('hivit_tiny', drop_path_rate=0.26, device='meta')
    np.testing.assert_allclose(drop_path_rates(model), np.linspace(0, 0.26, 14), atol=1e-6)


def test_layer_decay_counts_merges_as_blocks_and_tables_do_not_decay():
    model = timm.create_model('itpn_base.clip_in1k', num_classes=10, device='meta')
    scale = optimizer_scales(model, layer_decay=0.6)
    last = 3 + 1 + 3 + 1 + 24 + 1
    layers = {
        'patch_embed.proj.weight': 0,
        'patch_embed.norm.weight': 0,
        'stages.2.pos_embed': 0,
        'stages.0.blocks.0.mlp.fc1.weight': 1,
        'stages.1.downsample.reduction.weight': 4,
        'stages.2.downsample.reduction.weight': 8,
        'stages.2.blocks.0.rel_pos_bias.relative_position_bias_table': 9,
        'stages.2.blocks.23.mlp.fc2.weight': 32,
        'head.fc.weight': last,
    }
    assert len(scale) == len(list(model.parameters()))
    for name, layer in layers.items():
        assert scale[name][0] == pytest.approx(0.6 ** (last - layer)), name
    for name, parameter in model.named_parameters():
        kept = parameter.ndim == 1 or name.endswith(('pos_embed', 'relative_position_bias_table'))
        assert (scale[name][1] == 0.) == kept, name


def test_initialisation():
    torch.manual_seed(0)
    model = timm.create_model('itpn_tiny', num_classes=1000)
    for name, p in model.named_parameters():
        if 'norm' in name:
            assert (p == (1. if name.endswith('weight') else 0.)).all(), name
        elif name.endswith('relative_position_bias_table') or name.endswith('bias') and 'patch_embed' not in name:
            assert (p == 0.).all(), name
        elif name == 'head.fc.weight':
            assert p.std().item() == pytest.approx(0.0002, rel=0.05)
        elif 'patch_embed' not in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('mode', ['cast', 'autocast'])
def test_half_precision_stays_close_to_float64(dtype, mode):
    model = small_model('itpn_tiny', init_values=0.1)
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(x.double())
        if mode == 'cast':
            output = model.to(dtype)(x.to(dtype))
            assert output.dtype == dtype
        else:
            with torch.autocast('cpu', dtype=dtype):
                output = model(x)
    assert (output.double() - exact).abs().max() / exact.std() < 16 * torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_cuda_agrees_with_float64(dtype, train):
    model = small_model('itpn_tiny', img_size=(96, 160)).cuda().train(train)
    x = images(2, 3, 96, 160).cuda()
    exact = copy.deepcopy(model).double()
    with torch.set_grad_enabled(train):
        wanted = exact(x.double())
        output = model.to(dtype)(x.to(dtype)).double()
    bound = 16 * max(torch.finfo(dtype).eps, 1e-4)
    assert (output - wanted).abs().max() / wanted.std() < bound
    if train:
        wanted.sum().backward()
        output.sum().backward()
        actual, wanted = (m.stages[2].blocks[1].rel_pos_bias.relative_position_bias_table.grad for m in (model, exact))
        assert (actual.double() - wanted).abs().max() / wanted.std() < 4 * bound

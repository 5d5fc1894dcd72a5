"""Numbers that must hold: what the official models compute, their sizes, their initialisation."""
import copy

import pytest
import timm
import torch
from support import golden
from support.small import FAMILIES, images, small_model
from timm.layers import set_fused_attn

import timm_itpn

GOLDENS = {  # golden: model
    **{f'fast_itpn_{size}': f'fast_itpn_{size}' for size in ('tiny', 'small', 'base', 'large')},
    'itpn_base_clip': 'itpn_base.clip_in1k',
    'itpn_base_pixel': 'itpn_base.pixel_in1k',
    'itpn_large_pixel': 'itpn_large.pixel_in1k',
    'hivit_base': 'hivit_base.mae_in1k_ft_in1k',
}
EXACT = {'fast': 2e-7, 'itpn': 5e-6, 'hivi': 5e-6}  # family: bound of errors in float64
PARAMS = {  # iTPN with relative position bias; without layer scale but for the CLIP tags
    'itpn_tiny': 19_181_668,
    'itpn_small': 37_526_464,
    'itpn_base': 78_557_992,
    'itpn_base.clip_in1k': 78_583_720,
    'itpn_large': 288_493_576,
    'itpn_large.clip_in1k': 288_556_168,
    'hivit_base': 66_418_952,
    **{name: golden.load(name)['params'] for name in GOLDENS if name.startswith('fast')},
}


def fill_fast_itpn(model, official):
    """Copy official tensors into a native model, module by module: independent of the package's own key table."""
    number = 0

    def copy_module(module, name):
        for leaf, parameter in module.named_parameters(recurse=False):
            parameter.data.copy_(official.pop(f'{name}.{leaf}').reshape(parameter.shape))

    copy_module(model.patch_embed.proj, 'patch_embed.proj')
    model.stages[2].pos_embed.data.copy_(official.pop('pos_embed'))
    for index, stage in enumerate(model.stages):
        if index > 0:
            copy_module(stage.downsample.norm, f'blocks.{number}.norm')
            copy_module(stage.downsample.reduction, f'blocks.{number}.reduction')
            number += 1
        for block in stage.blocks:
            name = f'blocks.{number}'
            number += 1
            copy_module(block.mlp.norm, f'{name}.mlp.ffn_ln')
            if index < 2:
                copy_module(block.norm, f'{name}.norm2')
                copy_module(block.mlp.fc1, f'{name}.mlp.fc1')
                copy_module(block.mlp.fc2, f'{name}.mlp.fc2')
                continue
            copy_module(block.norm1, f'{name}.norm1')
            copy_module(block.norm2, f'{name}.norm2')
            copy_module(block.attn.proj, f'{name}.attn.proj')
            copy_module(block.mlp.fc2, f'{name}.mlp.w3')
            for part, letter in zip(block.attn.qkv.weight.data.chunk(3), 'qkv'):
                part.copy_(official.pop(f'{name}.attn.{letter}_proj.weight'))
            copy_module(block.attn.qkv_bias, f'{name}.attn')
            copy_module(block.mlp.fc1_g, f'{name}.mlp.w1')
            copy_module(block.mlp.fc1_x, f'{name}.mlp.w2')
            block.ls1.gamma.data.copy_(official.pop(f'{name}.gamma_1'))
            block.ls2.gamma.data.copy_(official.pop(f'{name}.gamma_2'))
    copy_module(model.head.norm, 'fc_norm')
    copy_module(model.head.fc, 'head')


def fill_itpn(model, official):
    """As `fill_fast_itpn`."""
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


FILLED = {'fast_itpn_tiny': fill_fast_itpn, 'itpn_base_clip': fill_itpn}


def assert_golden(model, expected, dtype, bound):
    with torch.inference_mode():
        final, features = model.forward_intermediates(golden.image(expected, dtype))
        logits = model.forward_head(final)
    assert golden.error(logits, expected['logits']) < bound
    for stride, wanted in expected.get('features', {}).items():
        feature = features[('stride4', 'stride8', 'stride16').index(stride)]
        if stride == 'stride16' or 'fast' in model.pretrained_cfg['architecture']:
            assert golden.error(feature, wanted) < bound


@pytest.mark.parametrize('name', GOLDENS)
def test_golden_values_hold(name):
    """In float64; in float32 the large ones, to save time, and one of each family, which is fused too."""
    expected = golden.load(name)
    dtype = torch.float32 if 'large' in name or name in FILLED else torch.float64
    model = timm.create_model(GOLDENS[name], num_classes=1000, device='meta').eval()
    model.load_state_dict(golden.official_state_dict(expected, dtype), assign=True)
    bound = 1e-4 if dtype == torch.float32 else EXACT[name[:4]]
    assert_golden(model, expected, dtype, bound)
    if name in FILLED:
        assert_golden(timm_itpn.fuse(model), expected, dtype, bound)


@pytest.mark.parametrize('name', FILLED)
def test_golden_values_hold_with_weights_filled_by_hand_and_plain_attention(name):
    """In float64, which finds what float32 does not."""
    expected = golden.load(name)
    official = golden.official_state_dict(expected)
    set_fused_attn(False)
    try:
        model = timm.create_model(GOLDENS[name], num_classes=1000, dtype=torch.float64, device='meta')
    finally:
        set_fused_attn(True)
    model.to_empty(device='cpu').eval()
    FILLED[name](model, official)
    assert not official
    assert_golden(model, expected, torch.float64, EXACT[name[:4]])


@pytest.mark.parametrize('name', PARAMS)
def test_parameter_count_is_the_published_one(name):
    model = timm.create_model(name, num_classes=1000, device='meta')
    assert sum(p.numel() for p in model.parameters()) == PARAMS[name]


@pytest.mark.parametrize('official, name', [
    ('fast_itpn_tiny_1112_patch16_224', 'fast_itpn_tiny'),
    ('fast_itpn_small_2220_patch16_224', 'fast_itpn_small'),
    ('fast_itpn_base_3324_patch16_224', 'fast_itpn_base'),
    ('fast_itpn_large_2240_patch16_256', 'fast_itpn_large'),
    ('itpn_base_3324_patch16_224', 'itpn_base'),
    ('itpn_large_2240_patch16_224', 'itpn_large'),
    ('itpn_large_2240_patch16_256', 'itpn_large'),
])
def test_official_name_creates_the_model(official, name):
    with pytest.warns(UserWarning, match=f'{official} to current {name}'):
        model = timm.create_model(official, device='meta')
    assert model.pretrained_cfg['architecture'] == name


@pytest.mark.parametrize('name', FAMILIES)
def test_initialisation_is_the_official_one(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=1000)
    parameters = dict(model.named_parameters())
    for key, p in parameters.items():
        if 'norm' in key:
            assert (p == (1. if key.endswith('weight') else 0.)).all(), key
        elif key.endswith('gamma'):
            assert (p == 0.1).all(), key
        elif 'patch_embed' in key or name == 'fast_itpn_tiny' and (
                key.startswith(('stages.0', 'stages.1')) or 'downsample' in key):
            # PyTorch's default for convolutions, which these layers are in official models
            bound = parameters[key.replace('bias', 'weight')][0].numel() ** -0.5
            assert 0.9 * bound < p.abs().max() <= bound, key
        elif key.endswith(('bias', 'relative_position_bias_table')):
            assert (p == 0.).all(), key
        else:
            assert p.std().item() == pytest.approx(0.0002 if key == 'head.fc.weight' else 0.02, rel=0.05), key


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('mode', ['cast', 'autocast'])
@pytest.mark.parametrize('name', FAMILIES)
def test_half_precision_stays_close_to_float64(name, dtype, mode):
    model = small_model(name, init_values=0.1, head_init_scale=1.)
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
@pytest.mark.parametrize('name', FAMILIES)
def test_cuda_agrees_with_float64(name, dtype, train):
    model = small_model(name, img_size=(96, 160)).cuda().train(train)
    x = images(2, 3, 96, 160).cuda()
    exact = copy.deepcopy(model).double()
    wanted, output = exact(x.double()), model.to(dtype)(x.to(dtype)).double()
    bound = 16 * max(torch.finfo(dtype).eps, 1e-4)
    assert (output - wanted).abs().max() / wanted.std() < bound
    if train and name == 'itpn_tiny':
        for outputs in (wanted, output):
            (1024 * outputs).sum().backward()  # float16 has no gradients as small as those of the sum
        actual, wanted = (m.stages[2].blocks[1].rel_pos_bias.relative_position_bias_table.grad for m in (model, exact))
        assert (actual.double() - wanted).abs().max() / wanted.std() < 4 * bound

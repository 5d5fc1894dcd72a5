"""The Fast-iTPN models: their values, and what timm's own suite does not ask of them."""
import copy

import numpy as np
import pytest
import timm
import torch
from support import golden
from support.small import drop_path_rates, optimizer_scales
from timm.layers import set_fused_attn

VARIANTS = ('tiny', 'small', 'base', 'large')


def fill_by_hand(model, official):
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
            for part, letter in ((block.attn.q_bias, 'q'), (block.attn.v_bias, 'v')):
                part.data.copy_(official.pop(f'{name}.attn.{letter}_bias'))
            for leaf in ('weight', 'bias'):
                for part, letter in zip(getattr(block.mlp.fc1, leaf).data.chunk(2), ('w1', 'w2')):
                    part.copy_(official.pop(f'{name}.mlp.{letter}.{leaf}'))
            block.ls1.gamma.data.copy_(official.pop(f'{name}.gamma_1'))
            block.ls2.gamma.data.copy_(official.pop(f'{name}.gamma_2'))
    copy_module(model.head.norm, 'fc_norm')
    copy_module(model.head.fc, 'head')
    assert not official


@pytest.mark.parametrize('fused', [0, 1], ids=['plain', 'fused'])
@pytest.mark.parametrize('construction', ['native', 'official_file'])
@pytest.mark.parametrize('variant', VARIANTS)
def test_golden_values_hold(variant, construction, fused, tmp_path):
    expected = golden.load(f'fast_itpn_{variant}')
    official = golden.official_state_dict(expected)
    set_fused_attn(fused == 1)
    try:
        if construction == 'native':
            model = timm.create_model(f'fast_itpn_{variant}', num_classes=1000, dtype=torch.float64)
            fill_by_hand(model, official)
        else:
            torch.save({'model': official}, tmp_path / 'official.pt')
            overlay = dict(file=str(tmp_path / 'official.pt'), num_classes=1000)
            model = timm.create_model(
                f'fast_itpn_{variant}', pretrained=True, pretrained_cfg_overlay=overlay, dtype=torch.float64)
            (tmp_path / 'official.pt').unlink()
    finally:
        set_fused_attn(True)
    model.eval()
    assert f'attn_impl={"sdpa" if fused else "reference"}' in repr(model.stages[2].blocks[0].attn)
    for dtype, bound in ((torch.float64, 2e-7), (torch.float32, 1e-4)):
        model.to(dtype)
        with torch.inference_mode():
            final, features = model.forward_intermediates(golden.image(expected, dtype))
            logits = model.forward_head(final)
        assert golden.error(logits, expected['logits']) < bound
        for feature, stride in zip(features, (4, 8, 16)):
            assert golden.error(feature, expected['features'][f'stride{stride}']) < bound


@pytest.mark.parametrize('variant', VARIANTS)
def test_parameter_count_is_the_published_one(variant):
    model = timm.create_model(f'fast_itpn_{variant}', num_classes=1000, device='meta')
    assert sum(p.numel() for p in model.parameters()) == golden.load(f'fast_itpn_{variant}')['params']


@pytest.mark.parametrize('official, name', [
    ('fast_itpn_tiny_1112_patch16_224', 'fast_itpn_tiny'),
    ('fast_itpn_small_2220_patch16_224', 'fast_itpn_small'),
    ('fast_itpn_base_3324_patch16_224', 'fast_itpn_base'),
    ('fast_itpn_large_2240_patch16_256', 'fast_itpn_large'),
])
def test_official_name_creates_the_model(official, name):
    with pytest.warns(UserWarning, match=f'{official} to current {name}'):
        model = timm.create_model(official, device='meta')
    assert model.pretrained_cfg['architecture'] == name


# training

def test_stochastic_depth_grows_linearly_over_the_blocks():
    model = timm.create_model('fast_itpn_base', drop_path_rate=0.29, device='meta')
    np.testing.assert_allclose(drop_path_rates(model), np.linspace(0, 0.29, 30), atol=1e-6)


def test_layer_decay_counts_merges_as_blocks():
    """Layer 0: stem and pos_embed; block or merge i of the official list: i + 1; norm and head: the last."""
    model = timm.create_model('fast_itpn_base', num_classes=10, device='meta')
    scale = optimizer_scales(model, layer_decay=0.9)
    last = 3 + 1 + 3 + 1 + 24 + 1
    layers = {
        'patch_embed.proj.weight': 0,
        'stages.2.pos_embed': 0,
        'stages.0.blocks.0.mlp.fc1.weight': 1,
        'stages.0.blocks.2.mlp.fc2.weight': 3,
        'stages.1.downsample.reduction.weight': 4,
        'stages.1.blocks.0.mlp.fc1.weight': 5,
        'stages.2.downsample.reduction.weight': 8,
        'stages.2.blocks.0.attn.qkv.weight': 9,
        'stages.2.blocks.23.mlp.fc2.weight': 32,
        'head.norm.weight': last,
        'head.fc.weight': last,
    }
    assert len(scale) == len(list(model.parameters()))
    for name, layer in layers.items():
        assert scale[name][0] == pytest.approx(0.9 ** (last - layer)), name
    undecayed = {name for name, (_, decay) in scale.items() if decay == 0.}
    assert undecayed == {n for n, p in model.named_parameters() if p.ndim == 1} | {'stages.2.pos_embed'}


def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    model = timm.create_model('fast_itpn_tiny', num_classes=1000)
    parameters = dict(model.named_parameters())
    for name, p in parameters.items():
        in_mlp_stage = name.startswith(('stages.0', 'stages.1', 'patch_embed')) or 'downsample.reduction' in name
        if 'norm' in name:
            assert (p == (1. if name.endswith('weight') else 0.)).all(), name
        elif name.endswith('gamma'):
            assert (p == 0.1).all(), name
        elif in_mlp_stage:  # PyTorch's default for convolutions: uniform, bound 1 / sqrt(fan_in)
            bound = parameters[name.replace('bias', 'weight')][0].numel() ** -0.5
            assert p.abs().max() <= bound and p.abs().max() > 0.9 * bound, name
        elif name == 'head.fc.weight':
            assert p.std().item() == pytest.approx(0.0002, rel=0.05)
        elif name.endswith('bias'):
            assert (p == 0.).all(), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('mode', ['cast', 'autocast'])
def test_half_precision_stays_close_to_float64(dtype, mode):
    expected = golden.load('fast_itpn_tiny')
    model = timm.create_model('fast_itpn_tiny', num_classes=1000).eval()
    model.load_state_dict(golden.official_state_dict(expected, torch.float32))
    x = golden.image(expected, torch.float32)
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(x.double())
        if mode == 'cast':
            output = model.to(dtype)(x.to(dtype))
            assert output.dtype == dtype
        else:
            with torch.autocast('cpu', dtype=dtype):
                output = model(x)
    error = (output.double() - exact).abs().max() / exact.std()
    assert error < 16 * torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_cuda_agrees_with_float64(dtype):
    expected = golden.load('fast_itpn_tiny')
    model = timm.create_model('fast_itpn_tiny', num_classes=1000).eval().cuda()
    model.load_state_dict(golden.official_state_dict(expected, torch.float32))
    x = golden.image(expected, torch.float32).cuda()
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(x.double())
        output = model.to(dtype)(x.to(dtype)).double()
    assert (output - exact).abs().max() / exact.std() < 16 * max(torch.finfo(dtype).eps, 1e-4)

"""The Fast-iTPN models: their values, and what timm's own suite does not ask of them."""
import copy
import io
import pickle

import golden
import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import DropPath, set_fused_attn
from timm.optim import create_optimizer_v2
from timm.utils.onnx import onnx_export

VARIANTS = ('tiny', 'small', 'base', 'large')
SMALL = dict(embed_dim=128, depths=(1, 2, 2), num_heads=2, img_size=64, num_classes=5)


def small_model(**kwargs):
    return timm.create_model('fast_itpn_tiny', **{**SMALL, **kwargs}).eval()


def images(*shape, dtype=torch.float32):
    return torch.from_numpy(golden.noise('image', shape)).to(dtype)


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
    assert f'attention={"sdpa" if fused else "reference"}' in repr(model.stages[2].blocks[0].attn)
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


# construction and input

@pytest.mark.parametrize('size', [220, (224, 230), 0, (8, 16)])
def test_img_size_off_the_grid_is_refused(size):
    with pytest.raises(ValueError, match='both sides must be multiples of 16'):
        small_model(img_size=size)
    with pytest.raises(ValueError, match='both sides must be multiples of 16'):
        small_model().set_input_size(size)


def test_input_of_another_size_is_refused_with_the_ways_out():
    with pytest.raises(ValueError, match='80 x 64 pixels, but the model is built for 64 x 64.*dynamic_img_size=True'):
        small_model()(torch.zeros(1, 3, 80, 64))


def test_dynamic_model_refuses_sides_off_the_grid():
    with pytest.raises(ValueError, match='72 x 64 pixels: both sides must be multiples of 16'):
        small_model(dynamic_img_size=True)(torch.zeros(1, 3, 72, 64))


def test_unknown_argument_is_refused():
    with pytest.raises(TypeError, match='unexpected keyword argument .window_size.'):
        small_model(window_size=7)


@pytest.mark.parametrize('pool', ['token', 'map', 'catavgmax'])
def test_unknown_pooling_is_refused(pool):
    with pytest.raises(ValueError, match=f"global_pool '{pool}' is unknown"):
        small_model(global_pool=pool)
    with pytest.raises(ValueError, match=f"global_pool '{pool}' is unknown"):
        small_model().reset_classifier(5, pool)


def test_embed_dim_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match='embed_dim 128 is not a multiple of num_heads 3'):
        small_model(num_heads=3)


def test_patch_size_cannot_change():
    model = small_model()
    model.set_input_size(patch_size=4)
    with pytest.raises(ValueError, match='patch_size cannot change'):
        model.set_input_size(patch_size=8)


@pytest.mark.parametrize('name', ['fast_itpn_tiny', 'vit_tiny_patch16_224'])
def test_empty_batch_is_as_with_vit(name):
    model = timm.create_model(name, num_classes=5).eval()
    output = model(torch.zeros(0, 3, 224, 224))
    assert output.shape == (0, 5)


@pytest.mark.parametrize('pool', ['avg', 'max', 'avgmax', ''])
def test_pooling_is_over_all_positions(pool):
    model = small_model(num_classes=0, global_pool=pool)
    model.head.norm = nn.Identity()
    with torch.inference_mode():
        features = model.forward_features(images(2, 3, 64, 64))
        flat = features.flatten(1, 2)
        pooled = dict(avg=flat.mean(1), max=flat.amax(1), avgmax=(flat.mean(1) + flat.amax(1)) / 2)
        torch.testing.assert_close(model.forward_head(features), pooled.get(pool, features))


def test_image_size_and_channels_follow_the_arguments():
    model = small_model(img_size=(64, 96), in_chans=4, num_classes=3)
    assert model.patch_embed.grid_size == (4, 6)
    assert model(torch.zeros(2, 4, 64, 96)).shape == (2, 3)


def test_resizing_matches_dynamic_size():
    dynamic = small_model(dynamic_img_size=True)
    resized = small_model()
    resized.load_state_dict(dynamic.state_dict())
    x = images(2, 3, 48, 112)
    resized.set_input_size((48, 112))
    with torch.inference_mode():
        torch.testing.assert_close(resized(x), dynamic(x))


def test_patches_do_not_mix_before_stage_3():
    """Everything before stage 3 stays inside one 16 x 16 patch."""
    model = small_model()
    x = images(1, 3, 64, 64)
    changed = x.clone()
    changed[:, :, 16:32, 32:48] += 1.
    with torch.inference_mode():
        before, after = (model.forward_intermediates(y, indices=[0, 1], intermediates_only=True) for y in (x, changed))
    for a, b, side in zip(before, after, (4, 2)):
        differs = (a != b).any(dim=1)[0]
        inside = torch.zeros_like(differs)
        inside[side:2 * side, 2 * side:3 * side] = True
        assert differs[inside].any() and not differs[~inside].any()


# training

def test_stochastic_depth_grows_linearly_over_the_blocks():
    model = timm.create_model('fast_itpn_base', drop_path_rate=0.29, device='meta')
    rates = []
    for stage in model.stages:
        for block in stage.blocks:
            paths = [m.drop_prob for m in block.modules() if isinstance(m, DropPath)]
            rates.append(paths[0] if paths else 0.)
            assert len(set(paths)) <= 1
    np.testing.assert_allclose(rates, np.linspace(0, 0.29, 30), atol=1e-6)


def test_layer_decay_counts_merges_as_blocks():
    """Layer 0: stem and pos_embed; block or merge i of the official list: i + 1; norm and head: the last."""
    model = timm.create_model('fast_itpn_base', num_classes=10, device='meta')
    scale = {}
    for group in create_optimizer_v2(model, opt='adamw', weight_decay=0.05, layer_decay=0.9).param_groups:
        for name, parameter in model.named_parameters():
            if any(parameter is p for p in group['params']):
                scale[name] = (group['lr_scale'], group['weight_decay'])
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


def test_gradient_checkpointing_keeps_the_gradients():
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = small_model().train()
        model.set_grad_checkpointing(enable)
        assert model.grad_checkpointing is enable
        model(images(2, 3, 64, 64)).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_dropout_rates_reach_their_places():
    model = small_model(drop_rate=0.1, pos_drop_rate=0.2, proj_drop_rate=0.3, attn_drop_rate=0.4)
    block = model.stages[2].blocks[0]
    assert (model.head.drop.p, model.stages[2].pos_drop.p, block.attn.attn_drop) == (0.1, 0.2, 0.4)
    assert block.attn.proj_drop.p == block.mlp.drop2.p == model.stages[0].blocks[0].mlp.drop2.p == 0.3
    assert block.mlp.drop1.p == 0.  # only at the end of a branch
    x = images(2, 3, 64, 64)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


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


# features

@pytest.mark.parametrize('output_fmt', ['NCHW', 'NHWC', 'NLC'])
def test_intermediates_have_the_format_asked_for(output_fmt):
    model = small_model(img_size=(64, 96))
    features = model.forward_intermediates(images(2, 3, 64, 96), output_fmt=output_fmt, intermediates_only=True)
    for feature, channels, stride in zip(features, (32, 64, 128), (4, 8, 16)):
        H, W = 64 // stride, 96 // stride
        shapes = dict(NCHW=(2, channels, H, W), NHWC=(2, H, W, channels), NLC=(2, H * W, channels))
        assert feature.shape == shapes[output_fmt]


def test_unknown_feature_format_is_refused():
    with pytest.raises(ValueError, match='output_fmt NWC is unknown'):
        small_model().forward_intermediates(images(1, 3, 64, 64), output_fmt='NWC')


@pytest.mark.parametrize('out_indices', [(0, 1, 2), (1,), (0, 2)])
@pytest.mark.parametrize('feature_cls', ['getter', 'hook', 'list', 'dict', 'fx'])
def test_every_feature_class_gives_the_same_maps(feature_cls, out_indices):
    torch.manual_seed(0)
    model = small_model()
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model.forward_intermediates(x, indices=out_indices, intermediates_only=True)
    torch.manual_seed(0)  # for the same weights
    backbone = small_model(features_only=True, feature_cls=feature_cls, out_indices=out_indices)
    assert backbone.feature_info.reduction() == [4 * 2 ** i for i in out_indices]
    assert backbone.feature_info.channels() == [32 * 2 ** i for i in out_indices]
    with torch.inference_mode():
        features = backbone(x)
    features = list(features.values()) if isinstance(features, dict) else features
    assert len(features) == len(expected)
    for feature, wanted in zip(features, expected):
        if str(backbone.output_fmt) == 'Format.NHWC':
            feature = feature.permute(0, 3, 1, 2)
        torch.testing.assert_close(feature, wanted)


def test_pruning_twice_and_reset_work():
    model = small_model()
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    model.prune_intermediate_layers([0])
    model.reset_classifier(7, 'avg')
    assert (model.num_features, model.head_hidden_size) == (32, 32)
    assert model(images(2, 3, 64, 64)).shape == (2, 7)


# compilers and exporters

def test_model_copies_and_pickles():
    model = small_model()
    x = images(1, 3, 64, 64)
    buffer = io.BytesIO(pickle.dumps(model))
    for twin in (copy.deepcopy(model), pickle.load(buffer)):
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize('dynamic', [False, True])
def test_compiles_without_graph_breaks(dynamic):
    model = small_model(dynamic_img_size=dynamic)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    sizes = [(64, 64), (96, 48)] if dynamic else [(64, 64)]
    with torch.inference_mode():
        for size in sizes:
            x = images(2, 3, *size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dynamic', [False, True])
def test_exports_with_torch_export(dynamic):
    model = small_model(dynamic_img_size=dynamic)
    shapes = None
    if dynamic:
        height, width = (torch.export.Dim(name, min=2, max=16) for name in ('height', 'width'))
        shapes = {'x': {0: torch.export.Dim('batch', min=1, max=8), 2: 16 * height, 3: 16 * width}}
    program = torch.export.export(model, (images(2, 3, 64, 96 if dynamic else 64),), dynamic_shapes=shapes)
    with torch.inference_mode():
        for size in ((2, 3, 64, 64), (3, 3, 128, 48)) if dynamic else ((2, 3, 64, 64),):
            x = images(*size)
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('use_dynamo', [False, True])
def test_onnx_runtime_agrees(use_dynamo, tmp_path):
    model = small_model(exportable=True)
    path = str(tmp_path / 'model.onnx')
    onnx_export(model, path, example_input=images(1, 3, 64, 64), use_dynamo=use_dynamo, check=True)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    x = images(1, 3, 64, 64)
    output = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(output, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_scripted_model_agrees():
    model = small_model(scriptable=True)
    x = images(2, 3, 64, 64)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


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

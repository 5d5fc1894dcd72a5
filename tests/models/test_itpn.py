"""What all families share, and timm's own suite does not ask: on small models of each."""
import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from support.small import FAMILIES, drop_path_rates, images, optimizer_scales, small_model
from timm.layers import set_fused_attn
from timm.models import save_for_hf

pytestmark = pytest.mark.usefixtures('one_thread')
every_family = pytest.mark.parametrize('name', FAMILIES)


# construction and input

@pytest.mark.parametrize('size', [220, (224, 230), 0, (8, 16)])
@every_family
def test_img_size_off_the_grid_is_refused(name, size):
    with pytest.raises(ValueError, match='both sides must be multiples of 16'):
        small_model(name, img_size=size)
    with pytest.raises(ValueError, match='both sides must be multiples of 16'):
        small_model(name).set_input_size(size)


@every_family
def test_input_of_another_size_is_refused_with_the_ways_out(name):
    with pytest.raises(ValueError, match='80 x 64 pixels, but the model is built for 64 x 64.*dynamic_img_size=True'):
        small_model(name)(torch.zeros(1, 3, 80, 64))


@every_family
def test_dynamic_model_refuses_sides_off_the_grid(name):
    with pytest.raises(ValueError, match='72 x 64 pixels: both sides must be multiples of 16'):
        small_model(name, dynamic_img_size=True)(torch.zeros(1, 3, 72, 64))


@every_family
def test_unknown_argument_is_refused(name):
    with pytest.raises(TypeError, match='unexpected keyword argument .window_size.'):
        small_model(name, window_size=7)


@pytest.mark.parametrize('pool', ['token', 'map', 'catavgmax'])
@every_family
def test_unknown_pooling_is_refused(name, pool):
    with pytest.raises(ValueError, match=f"global_pool '{pool}' is unknown"):
        small_model(name, global_pool=pool)
    with pytest.raises(ValueError, match=f"global_pool '{pool}' is unknown"):
        small_model(name).reset_classifier(5, pool)


@every_family
def test_embed_dim_that_heads_do_not_divide_is_refused(name):
    with pytest.raises(ValueError, match='embed_dim 128 is not a multiple of num_heads 3'):
        small_model(name, num_heads=3)


@every_family
def test_patch_size_cannot_change(name):
    model = small_model(name)
    model.set_input_size(patch_size=4)
    with pytest.raises(ValueError, match='patch_size cannot change'):
        model.set_input_size(patch_size=8)


@pytest.mark.parametrize('name', [*FAMILIES, 'vit_tiny_patch16_224'])
def test_empty_batch_is_as_with_vit(name):
    model = timm.create_model(name, num_classes=5).eval()
    output = model(torch.zeros(0, 3, 224, 224))
    assert output.shape == (0, 5)


@pytest.mark.parametrize('pool', ['avg', 'max', 'avgmax', ''])
@every_family
def test_pooling_is_over_all_positions(name, pool):
    model = small_model(name, num_classes=0, global_pool=pool)
    model.head.norm = nn.Identity()
    with torch.inference_mode():
        features = model.forward_features(images(2, 3, 64, 64))
        flat = features.flatten(1, 2)
        pooled = dict(avg=flat.mean(1), max=flat.amax(1), avgmax=(flat.mean(1) + flat.amax(1)) / 2)
        torch.testing.assert_close(model.forward_head(features), pooled.get(pool, features))


@every_family
def test_image_size_and_channels_follow_the_arguments(name):
    model = small_model(name, img_size=(64, 96), in_chans=4, num_classes=3)
    assert model.patch_embed.grid_size == (4, 6)
    assert model(torch.zeros(2, 4, 64, 96)).shape == (2, 3)


@every_family
def test_resizing_matches_dynamic_size(name):
    dynamic = small_model(name, dynamic_img_size=True)
    resized = small_model(name)
    resized.load_state_dict(dynamic.state_dict())
    x = images(2, 3, 48, 112)
    resized.set_input_size((48, 112))
    with torch.inference_mode():
        torch.testing.assert_close(resized(x), dynamic(x))


@every_family
def test_patches_do_not_mix_before_stage_3(name):
    """Everything before stage 3 stays inside one 16 x 16 patch."""
    model = small_model(name)
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

@every_family
def test_gradient_checkpointing_keeps_the_gradients(name):
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = small_model(name).train()
        model.set_grad_checkpointing(enable)
        assert model.grad_checkpointing is enable
        model(images(2, 3, 64, 64)).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@every_family
def test_dropout_rates_reach_their_layers(name):
    model = small_model(name, drop_rate=0.1, pos_drop_rate=0.2, proj_drop_rate=0.3, attn_drop_rate=0.4)
    block = model.stages[2].blocks[0]
    assert (model.head.drop.p, model.stages[2].pos_drop.p, block.attn.attn_drop_rate) == (0.1, 0.2, 0.4)
    assert block.attn.proj_drop.p == block.mlp.drop2.p == model.stages[0].blocks[0].mlp.drop2.p == 0.3
    assert block.mlp.drop1.p == 0.  # only at the end of a branch
    x = images(2, 3, 64, 64)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize('name, rate', [('fast_itpn_base', 0.29), ('hivit_base', 0.27)])
def test_stochastic_depth_grows_linearly_over_the_blocks(name, rate):
    rates = drop_path_rates(timm.create_model(name, drop_path_rate=rate, device='meta'))
    np.testing.assert_allclose(rates, np.linspace(0, rate, len(rates)), atol=1e-6)


@pytest.mark.parametrize('name', ['fast_itpn_base', 'itpn_base.clip_in1k'])
def test_layer_decay_counts_merges_as_blocks_and_positions_do_not_decay(name):
    """Layer 0: stem and pos_embed; block or merge i of the official list: i + 1; norm and head: the last."""
    model = timm.create_model(name, num_classes=10, device='meta')
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
    if name.startswith('itpn'):
        layers['stages.2.blocks.0.rel_pos_bias.relative_position_bias_table'] = 9
    assert len(scale) == len(list(model.parameters()))
    for key, layer in layers.items():
        assert scale[key][0] == pytest.approx(0.9 ** (last - layer)), key
    for key, parameter in model.named_parameters():
        kept = parameter.ndim == 1 or key.endswith(('pos_embed', 'relative_position_bias_table'))
        assert (scale[key][1] == 0.) == kept, key


# features

@pytest.mark.parametrize('output_fmt', ['NCHW', 'NHWC', 'NLC'])
@every_family
def test_intermediates_have_the_format_asked_for(name, output_fmt):
    model = small_model(name, img_size=(64, 96))
    features = model.forward_intermediates(images(2, 3, 64, 96), output_fmt=output_fmt, intermediates_only=True)
    for feature, channels, stride in zip(features, (32, 64, 128), (4, 8, 16)):
        H, W = 64 // stride, 96 // stride
        shapes = dict(NCHW=(2, channels, H, W), NHWC=(2, H, W, channels), NLC=(2, H * W, channels))
        assert feature.shape == shapes[output_fmt]


@every_family
def test_unknown_feature_format_is_refused(name):
    with pytest.raises(ValueError, match='output_fmt NWC is unknown'):
        small_model(name).forward_intermediates(images(1, 3, 64, 64), output_fmt='NWC')


@pytest.mark.parametrize('out_indices', [(0, 1, 2), (1,), (0, 2)])
@pytest.mark.parametrize('feature_cls', ['getter', 'hook', 'list', 'dict', 'fx'])
@every_family
def test_every_feature_class_gives_the_same_maps(name, feature_cls, out_indices):
    torch.manual_seed(0)
    model = small_model(name)
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model.forward_intermediates(x, indices=out_indices, intermediates_only=True)
    torch.manual_seed(0)  # for the same weights
    backbone = small_model(name, features_only=True, feature_cls=feature_cls, out_indices=out_indices)
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


@every_family
def test_pruning_twice_and_reset_work(name):
    model = small_model(name)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    model.prune_intermediate_layers([0])
    model.reset_classifier(7, 'avg')
    assert (model.num_features, model.head_hidden_size) == (32, 32)
    assert model(images(2, 3, 64, 64)).shape == (2, 7)


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
    small = dict(embed_dim=64, depths=(1, 1, 2), num_heads=2, img_size=32, num_classes=5)
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


@pytest.mark.parametrize('size', [(224, 224), (96, 160)])
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

"""What both families share, and timm's own suite does not ask: on small models of each."""
import copy
import io
import pickle

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.nn as nn
from support.small import FAMILIES, images, small_model
from timm.utils.onnx import onnx_export

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
def test_dropout_rates_reach_their_places(name):
    model = small_model(name, drop_rate=0.1, pos_drop_rate=0.2, proj_drop_rate=0.3, attn_drop_rate=0.4)
    block = model.stages[2].blocks[0]
    assert (model.head.drop.p, model.stages[2].pos_drop.p, block.attn.attn_drop) == (0.1, 0.2, 0.4)
    assert block.attn.proj_drop.p == block.mlp.drop2.p == model.stages[0].blocks[0].mlp.drop2.p == 0.3
    assert block.mlp.drop1.p == 0.  # only at the end of a branch
    x = images(2, 3, 64, 64)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


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


# compilers and exporters

@every_family
def test_model_copies_and_pickles(name):
    model = small_model(name)
    x = images(1, 3, 64, 64)
    buffer = io.BytesIO(pickle.dumps(model))
    for twin in (copy.deepcopy(model), pickle.load(buffer)):
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize('dynamic', [False, True])
@every_family
def test_compiles_without_graph_breaks(name, dynamic):
    model = small_model(name, dynamic_img_size=dynamic)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    sizes = [(64, 64), (96, 48)] if dynamic else [(64, 64)]
    with torch.inference_mode():
        for size in sizes:
            x = images(2, 3, *size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dynamic', [False, True])
@every_family
def test_exports_with_torch_export(name, dynamic):
    model = small_model(name, dynamic_img_size=dynamic)
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
@every_family
def test_onnx_runtime_agrees(name, use_dynamo, tmp_path):
    model = small_model(name, exportable=True)
    path = str(tmp_path / 'model.onnx')
    onnx_export(model, path, example_input=images(1, 3, 64, 64), use_dynamo=use_dynamo, check=True)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    x = images(1, 3, 64, 64)
    output = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(output, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


@every_family
def test_scripted_model_agrees(name):
    model = small_model(name, scriptable=True)
    x = images(2, 3, 64, 64)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))

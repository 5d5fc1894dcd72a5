"""Compilers, tracers and exporters take the models, and what they make computes the same."""
import functools
import os
import subprocess
import sys

import pytest
import torch
from functorch.compile import memory_efficient_fusion
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from support.onnx_runtime import load_onnx
from support.small import FAMILIES, PYRAMIDS, images, small_model
from timm.utils.onnx import onnx_export
from torchvision.models.feature_extraction import create_feature_extractor

import timm_itpn
from timm_itpn.models.detection import DetectionBackbone

TINY = dict(embed_dim=64, depths=(1, 1, 1), head_init_scale=1.)
FULL = dict(depths=(1, 1, 2), acceleration='full', gather_window=2, migrate={0: 1})

pytestmark = pytest.mark.usefixtures('one_thread')
every_family = pytest.mark.parametrize('name', FAMILIES)
every_acceleration = pytest.mark.parametrize('acceleration', [{}, FULL], ids=['plain', 'accelerated'])


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@every_family
def test_exported_program_agrees(name):
    model = small_model(name, **TINY)
    x = images(2, 3, 64, 64)
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        assert_same(program.module()(x), model(x))


@every_family
def test_exported_program_has_no_operator_that_coremltools_lacks(name):
    """Those of version 9.0, which converts the models otherwise."""
    program = torch.export.export(small_model(name, exportable=True, **TINY), (images(1, 3, 64, 64),))
    found = {str(node.target) for node in program.run_decompositions({}).graph.nodes}
    assert 'aten.linear.default' in found and not {'aten.alias.default', 'aten.new_ones.default'} & found


@pytest.mark.filterwarnings('ignore:Constant folding')  # of the exporter, on slices of windows
@pytest.mark.parametrize('name, how', [
    ('fast_itpn_tiny', 'timm'),
    ('itpn_tiny', 'torch.onnx'),
    *[(name, 'timm without dynamo') for name in FAMILIES],
    ('fast_itpn_tiny', 'accelerated'),
])
def test_onnx_runtime_agrees(name, how, tmp_path):
    more = FULL if how == 'accelerated' else {}
    model = small_model(name, exportable=how != 'torch.onnx', **TINY | more)
    x, path = images(1, 3, 64, 64), str(tmp_path / 'model.onnx')
    if how == 'torch.onnx':  # with gradients enabled, as users call it
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    else:
        onnx_export(model, path, example_input=x, use_dynamo=how == 'timm', check=True)
    output, = load_onnx(path)(x)
    assert_same(output, model(x).detach())


class Images(CalibrationDataReader):
    """On which the ranges of activations are measured."""

    def __init__(self, *batches):
        self.batches = iter(batches)

    def get_next(self):
        return next(({'x': batch.numpy()} for batch in self.batches), None)


@pytest.mark.parametrize('ranges, error, size', [('as they come', 0.3, 0.5), ('measured', 0.5, 0.6)])
@every_family
def test_onnx_runtime_quantises(name, ranges, error, size, tmp_path):
    model = small_model(name, exportable=True, **TINY)
    x, path, int8 = images(1, 3, 64, 64), str(tmp_path / 'model.onnx'), str(tmp_path / 'int8.onnx')
    torch.onnx.export(model, (x,), path, dynamo=False, input_names=['x'])
    if ranges == 'measured':
        quantize_static(path, int8, Images(x), weight_type=QuantType.QInt8)
    else:
        quantize_dynamic(path, int8, weight_type=QuantType.QInt8)
    output, = load_onnx(int8)(x)
    expected = model(x).detach()
    assert 0 < (output - expected).norm() < error * expected.norm()  # small random layers round coarsely
    assert os.path.getsize(int8) < size * os.path.getsize(path)


@pytest.mark.filterwarnings('ignore:Constant folding')
@pytest.mark.parametrize('name, acceleration', list(zip(PYRAMIDS, ({}, FULL))))
def test_features_of_any_size_take_the_plain_path_at_the_size_that_they_are_built_for(name, acceleration, tmp_path):
    model = small_model(name, features_only=True, dynamic_img_size=True, exportable=True, **TINY | acceleration)
    x, path = images(1, 3, 64, 64), tmp_path / 'model.onnx'
    with torch.no_grad():
        expected, traced = model(x), torch.jit.trace(model, x)
        program = torch.export.export(model, (x,))
        assert 'timm_itpn::' not in f'{program.graph} {traced.inlined_graph}'
        torch.onnx.export(model, (x,), path, dynamo=False)
        for outputs in (traced(x), program.module()(x), torch.jit.script(model)(x), load_onnx(path)(x)):
            for actual, wanted in zip(outputs, expected, strict=True):
                assert_same(actual, wanted)


def test_onnx_features_have_all_rows_where_sides_are_no_multiples_of_the_stride(tmp_path):
    model = small_model('fast_itpn_tiny', features_only=True, dynamic_img_size=True, exportable=True, **TINY)
    x, path = images(1, 3, 90, 70), tmp_path / 'model.onnx'
    with torch.no_grad():
        torch.onnx.export(
            model, (images(1, 3, 96, 64),), path, dynamo=False, input_names=['x'], dynamic_axes={'x': {2: 'h', 3: 'w'}})
        for actual, wanted in zip(load_onnx(path)(x), model(x), strict=True):
            assert_same(actual, wanted)


ELSEWHERE = """
import sys
sys.modules.update(dict.fromkeys(['timm', 'timm_itpn', 'einops']))  # importing them fails
import torch
x, expected = torch.load('expected.pt')
for program in (torch.jit.load('script.pt'), torch.jit.load('trace.pt'), torch.export.load('program.pt2').module()):
    with torch.no_grad():
        torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)
"""


def test_programs_run_where_the_package_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = functools.partial(small_model, 'itpn_tiny_fpn', features_only=True, dynamic_img_size=True, **TINY)
    model, x, example = small(), images(1, 3, 96, 160), images(1, 3, 128, 96)
    side = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        torch.save((x, model(x)), 'expected.pt')
        torch.jit.script(small(scriptable=True)).save('script.pt')
        torch.jit.trace(small(exportable=True), example).save('trace.pt')
        program = torch.export.export(small(exportable=True), (example,), dynamic_shapes={'x': {2: side, 3: side}})
        torch.export.save(program, 'program.pt2')
    monkeypatch.setenv('TORCH_DEVICE_BACKEND_AUTOLOAD', '0')  # PyTorch would import the installed package
    subprocess.run([sys.executable, '-c', ELSEWHERE], check=True)


def test_scripted_detection_backbone_agrees():
    model = DetectionBackbone('fast_itpn_tiny_fpn', scriptable=True, dynamic_img_size=True, num_heads=2, **TINY).eval()
    x = images(1, 3, 64, 96)
    with torch.no_grad():
        assert_same(dict(torch.jit.script(model)(x)), model(x))


@pytest.mark.parametrize('fused', [False, True], ids=['model', 'fused'])
@every_acceleration
@every_family
def test_scripted_model_agrees(name, acceleration, fused):
    model = small_model(name, scriptable=True, **TINY | acceleration)
    model = timm_itpn.fuse(model) if fused else model
    x = images(2, 3, 64, 64)
    scripted = torch.jit.script(model)
    assert_same(scripted(x), model(x))
    with torch.no_grad():
        assert_same(scripted(x), model(x))


@every_acceleration
@every_family
def test_traced_model_takes_other_batches(name, acceleration):
    model = small_model(name, **TINY | acceleration)
    x = images(3, 3, 64, 64)
    with torch.no_grad():
        traced = torch.jit.trace(model, images(3 if acceleration else 2, 3, 64, 64))
        assert_same(traced(x), model(x))


@pytest.mark.parametrize('dynamic', [False, True])
@every_family
def test_graph_of_fx_agrees(name, dynamic):
    model = small_model(name, **TINY, dynamic_img_size=dynamic)
    x = images(2, 3, 64, 96 if dynamic else 64)
    graph = torch.fx.symbolic_trace(model)
    assert_same(graph(x), model(x))
    wanted = []
    model.stages[2].blocks[0].attn.qkv.register_forward_hook(lambda module, args, output: wanted.append(output))
    model(x)
    nodes = {'stages.2.blocks.0.attn.qkv': 'qkv', 'head.fc': 'logits'}
    features = create_feature_extractor(model, nodes)(x)
    assert_same(features['qkv'], wanted[0])
    assert_same(features['logits'], model(x))


def test_memory_efficient_fusion_trains():
    """`--aot-autograd` of timm's scripts. For iTPN's bias it would need torch.arange in TorchScript."""
    model = small_model('fast_itpn_tiny', **TINY).train()
    x = images(2, 3, 64, 64)
    gradients = []
    for module in (model, memory_efficient_fusion(model)):
        module(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
    assert_same(*gradients)


@every_family
def test_functional_calls_see_their_weights(name):
    model = small_model(name, **TINY)
    other = small_model(name, seed=1, **TINY)
    x = images(2, 3, 64, 64)
    call = functools.partial(torch.func.functional_call, model)
    with torch.no_grad():
        model(x)
        assert_same(call(other.state_dict(), (x,)), other(x))
        stacked, _ = torch.func.stack_module_state([model, other])
        both = torch.func.vmap(call, in_dims=(0, None))(stacked, (x,))
        assert_same(both, torch.stack([model(x), other(x)]))

"""Linear layers with oneDNN's product compute what PyTorch's do, with all derivatives; and the packed projection."""
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support.small import small_model
from torch.utils.flop_counter import FlopCounterMode

from timm_itpn.layers import linear
from timm_itpn.layers.attention import QkvBias
from timm_itpn.layers.linear import OneDnnLinear, OneDnnProduct, is_onednn_faster, use_onednn
from timm_itpn.ops.linear import can_use_onednn

ROWS, IN, OUT = (2, 150), 96, 192  # large enough for oneDNN
LAYER = OneDnnLinear(IN, OUT)

needs_onednn = pytest.mark.skipif(
    not can_use_onednn(torch.zeros(1, 1)), reason='this build of PyTorch has no oneDNN')


def inputs(dtype=torch.float32, rows=ROWS):
    generator = torch.Generator().manual_seed(0)
    shapes = (*rows, IN), (OUT, IN), (OUT,)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def by_layer(x, weight, bias):
    return torch.func.functional_call(LAYER, {'weight': weight, 'bias': bias}, (x,))


def derivatives(forward, dtype):
    """Output, gradients and gradients of their squares, for x, weight and bias."""
    tensors = inputs(dtype)
    out = forward(*tensors)
    first = torch.autograd.grad(out.square().mean(), tensors, create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in first), tensors)
    return [out, *first, *second]


@needs_onednn
def test_derivatives_agree_with_float64_as_well_as_those_of_eager_do():
    results = [derivatives(by_layer, torch.float32), derivatives(F.linear, torch.float32),
               derivatives(F.linear, torch.float64)]
    for actual, eager, wanted in zip(*results, strict=True):
        bound = 2 * (eager.double() - wanted).abs().max() + 1e-6 * wanted.abs().max()
        assert (actual.double() - wanted).abs().max() <= bound


@needs_onednn
@pytest.mark.filterwarnings('ignore:Input .* precision')  # oneDNN has no float64; the product is linear in each input
def test_product_has_all_first_derivatives():
    x, weight, bias = (tensor.detach()[:5].requires_grad_() for tensor in inputs(rows=(5,)))
    assert torch.autograd.gradcheck(
        OneDnnProduct.apply, (x, weight, bias), eps=0.1, atol=1e-2, check_batched_grad=True)


@needs_onednn
def test_layer_goes_through_function_transforms():
    x, weight, bias = inputs()
    with torch.no_grad():
        mapped = torch.func.vmap(lambda weight: by_layer(x, weight, bias))(torch.stack([weight, -weight]))
        torch.testing.assert_close(mapped[1], F.linear(x, -weight, bias))

    def per_sample(forward):
        return torch.func.vmap(torch.func.grad(lambda x: forward(x, weight, bias).square().mean()))(x)

    torch.testing.assert_close(per_sample(by_layer), per_sample(F.linear))
    tangents = tuple(tensor.flip(0).detach() for tensor in (x, weight, bias))
    forward, wanted = (torch.func.jvp(layer, (x, weight, bias), tangents) for layer in (by_layer, F.linear))
    torch.testing.assert_close(forward, wanted)


@needs_onednn
def test_only_the_gradients_that_are_wanted_are_computed_and_counted():
    layer, x = OneDnnLinear(IN, OUT), inputs()[0].detach()
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * x.numel() * OUT  # forward, and the gradient of the weight


@pytest.mark.parametrize('x', [torch.zeros(1000, IN, dtype=torch.bfloat16), torch.zeros(1000, IN + 1)])
def test_input_that_does_not_fit_is_told_as_pytorch_does(x):
    messages = []
    for layer in (nn.Linear(IN, OUT), OneDnnLinear(IN, OUT)):
        with pytest.raises(RuntimeError) as error:
            layer(x)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize('shape', [(IN,), (0, IN), (2, 0, IN), (2, 3, 50, IN)])
def test_shapes_types_and_autocast_are_those_of_a_linear_layer(shape):
    layer = OneDnnLinear(IN, OUT)
    x = torch.ones(shape)
    assert layer(x).shape == (*shape[:-1], OUT)
    assert copy.deepcopy(layer).double()(x.double()).dtype == torch.float64
    assert copy.deepcopy(layer).to('meta')(x.to('meta')).is_meta
    with torch.autocast('cpu', torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize('cpu, name', [
    ({'cpu_name': 'AMD EPYC', 'avx512_f': True}, 'OneDnnLinear'),
    ({'cpu_name': 'AMD EPYC', 'avx512_f': False}, 'Linear'),
    ({'cpu_name': 'Intel(R) Xeon(R)', 'avx512_f': True}, 'Linear'),
    ({}, 'Linear'),
])
def test_layers_are_replaced_only_where_it_pays(cpu, name, monkeypatch):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: cpu, raising=False)
    monkeypatch.setattr(torch.backends.mkl, 'is_available', lambda: True)
    is_onednn_faster.cache_clear()
    try:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 6, bias=False), nn.Conv2d(1, 1, 1))
        state_dict = model.state_dict()
        use_onednn(model)
        assert [type(layer).__name__ for layer in model] == [name, name, 'Conv2d']
        assert all(value is model.state_dict()[key] or torch.equal(value, model.state_dict()[key])
                   for key, value in state_dict.items())
    finally:
        is_onednn_faster.cache_clear()


@needs_onednn
def test_models_with_and_without_agree(monkeypatch):
    monkeypatch.setattr(linear, 'MIN_MULTIPLY_ADDS', 0)
    models = []
    for faster in (False, True):
        monkeypatch.setattr(linear, 'is_onednn_faster', lambda faster=faster: faster)
        models.append(small_model('fast_itpn_tiny', head_init_scale=1.))
    x = torch.randn(2, 3, 64, 64)
    outputs = [model(x) for model in models]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.sum().backward()
    torch.testing.assert_close(*[[p.grad for p in model.parameters()] for model in models], rtol=1e-3, atol=1e-4)


def test_keys_have_no_bias():
    layer = QkvBias(8)
    nn.init.normal_(layer.q_bias)
    nn.init.normal_(layer.v_bias)
    q, k, v = layer(torch.zeros(24)).chunk(3)
    assert torch.equal(q, layer.q_bias) and not k.any() and torch.equal(v, layer.v_bias)
    assert layer(torch.zeros(24).bfloat16()).dtype == torch.bfloat16

"""The linear layer for inference, by oneDNN and plain, against float64; and where oneDNN can run."""
import pytest
import torch
import torch.nn.functional as F

from timm_itpn.ops.linear import ACTIVATIONS, can_use_onednn, onednn_linear, pack_for_onednn, plain_linear

ROWS, IN, OUT = (3, 77), 96, 200


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = dict(x=(*ROWS, IN), weight=(OUT, IN), bias=(OUT,), residual=(*ROWS, OUT))
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: tensor.bfloat16().to(dtype) for name, tensor in tensors.items()}  # all types have the same numbers


def by_onednn(x, weight, *rest):
    return onednn_linear(x, pack_for_onednn(weight), *rest)


FORWARD = {'onednn': by_onednn, 'plain': plain_linear}


def eager(x, weight, bias, act, residual):
    x = F.linear(x, weight, bias)
    x = {'none': lambda y: y, 'gelu': F.gelu, 'silu': F.silu}[act](x)
    return x if residual is None else x + residual


@pytest.mark.parametrize('case', [*ACTIVATIONS, 'residual', 'gelu and residual', 'no bias'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', FORWARD)
def test_agrees_with_float64_as_well_as_eager_does(name, dtype, case):
    def arguments(dtype):
        tensors = inputs(dtype)
        bias = None if case == 'no bias' else tensors['bias']
        act = next((act for act in ACTIVATIONS if case.startswith(act)), 'none')
        return tensors['x'], tensors['weight'], bias, act, tensors['residual'] if 'residual' in case else None

    if name == 'onednn' and not can_use_onednn(inputs(dtype)['weight']):
        pytest.skip(f'oneDNN cannot multiply {dtype} on this CPU')
    exact = eager(*arguments(torch.float64))
    bound = 2 * (eager(*arguments(dtype)).double() - exact).abs().max() + 1e-14
    actual = FORWARD[name](*arguments(dtype))
    assert actual.dtype == dtype
    assert (actual.double() - exact).abs().max() <= bound


@pytest.mark.parametrize('shape', [(IN,), (0, IN), (2, 0, IN), (2, 3, 50, IN)])
@pytest.mark.parametrize('name', FORWARD)
def test_shapes_are_those_of_a_linear_layer(name, shape):
    weight, bias = (inputs(torch.float32)[name] for name in ('weight', 'bias'))
    assert FORWARD[name](torch.zeros(shape), weight, bias).shape == (*shape[:-1], OUT)


def test_onednn_is_for_some_types_on_the_cpu():
    assert can_use_onednn(torch.zeros(8, 8))
    assert not can_use_onednn(torch.zeros(8, 8, dtype=torch.float64))
    assert not can_use_onednn(torch.zeros(8, 8, device='meta'))


def test_onednn_can_be_switched_off():
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        assert not can_use_onednn(torch.zeros(8, 8))
    finally:
        torch.backends.mkldnn.enabled = enabled


def test_plain_layer_is_differentiable_for_compilers():
    x = torch.randn(2, IN, requires_grad=True)
    plain_linear(x, torch.randn(OUT, IN), None, 'gelu').sum().backward()
    assert x.grad is not None

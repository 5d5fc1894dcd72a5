"""Every implementation of the linear layer for inference against float64, and the rules for choosing one."""
import pytest
import torch
import torch.nn.functional as F

from timm_itpn.ops.linear import ACTIVATIONS, IMPLEMENTATIONS, choose_linear

ROWS, IN, OUT = (3, 77), 96, 200


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = dict(x=(*ROWS, IN), weight=(OUT, IN), bias=(OUT,), residual=(*ROWS, OUT))
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: tensor.bfloat16().to(dtype) for name, tensor in tensors.items()}  # all types have the same numbers


def eager(x, weight, bias, act, residual):
    x = F.linear(x, weight, bias)
    x = {'none': lambda y: y, 'gelu': F.gelu, 'silu': F.silu}[act](x)
    return x if residual is None else x + residual


@pytest.mark.parametrize('case', [*ACTIVATIONS, 'residual', 'gelu and residual', 'no bias'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_agrees_with_float64_as_well_as_eager_does(name, dtype, case):
    def arguments(dtype):
        tensors = inputs(dtype)
        bias = None if case == 'no bias' else tensors['bias']
        act = next((act for act in ACTIVATIONS if case.startswith(act)), 'none')
        return tensors['x'], tensors['weight'], bias, act, tensors['residual'] if 'residual' in case else None

    implementation = IMPLEMENTATIONS[name]
    x, weight, *rest = arguments(dtype)
    reason = implementation.why_not(weight)
    if reason is not None:
        pytest.skip(reason)
    exact = eager(*arguments(torch.float64))
    bound = 2 * (eager(*arguments(dtype)).double() - exact).abs().max() + 1e-14
    actual = implementation.forward(x, implementation.pack(weight), *rest)
    assert actual.dtype == dtype
    assert (actual.double() - exact).abs().max() <= bound


@pytest.mark.parametrize('shape', [(IN,), (0, IN), (2, 0, IN), (2, 3, 50, IN)])
@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_shapes_are_those_of_a_linear_layer(name, shape):
    weight, bias = (inputs(torch.float32)[name] for name in ('weight', 'bias'))
    packed = IMPLEMENTATIONS[name].pack(weight)
    assert IMPLEMENTATIONS[name].forward(torch.zeros(shape), packed, bias).shape == (*shape[:-1], OUT)


def test_the_first_that_can_run_is_chosen():
    assert choose_linear(torch.zeros(8, 8)) == 'onednn'
    assert choose_linear(torch.zeros(8, 8, dtype=torch.float64)) == 'reference'
    assert choose_linear(torch.zeros(8, 8, device='meta')) == 'reference'


def test_onednn_can_be_switched_off():
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        assert choose_linear(torch.zeros(8, 8)) == 'reference'
    finally:
        torch.backends.mkldnn.enabled = enabled


def test_reference_is_differentiable_for_compilers():
    x = torch.randn(2, IN, requires_grad=True)
    IMPLEMENTATIONS['reference'].forward(x, torch.randn(OUT, IN), None, 'gelu').sum().backward()
    assert x.grad is not None

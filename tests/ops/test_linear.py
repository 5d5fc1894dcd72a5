"""Every implementation of the linear layer against float64, and the rules for choosing one."""
import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from timm_itpn.ops.linear import ACTIVATIONS, IMPLEMENTATIONS, TRAINABLE, choose, onednn_grad, reference

ROWS, IN, OUT = (3, 77), 96, 200  # large enough for `onednn_grad`


@pytest.fixture(autouse=True)
def on_any_cpu(monkeypatch):
    """Run what would be left to PyTorch on CPUs where it is no slower."""
    monkeypatch.setattr(onednn_grad, 'why_not_here', lambda: None)


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


def derivatives(forward, dtype, *names):
    """Output, gradients and gradients of their squares, for x, weight and perhaps bias."""
    tensors = [inputs(dtype)[name].requires_grad_() for name in names]
    out = forward(*tensors, *[None] * (3 - len(names)))
    first = torch.autograd.grad(out.square().mean(), tensors, create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in first), tensors)
    return [out, *first, *second]


@pytest.mark.parametrize('names', [('x', 'weight', 'bias'), ('x', 'weight')])
@pytest.mark.parametrize('name', TRAINABLE)
def test_derivatives_agree_with_float64_as_well_as_those_of_eager_do(name, names):
    exact = derivatives(F.linear, torch.float64, *names)
    for actual, eager_one, wanted in zip(
            derivatives(IMPLEMENTATIONS[name].forward, torch.float32, *names),
            derivatives(F.linear, torch.float32, *names),
            exact,
            strict=True,
    ):
        bound = 2 * (eager_one.double() - wanted).abs().max() + 1e-6 * wanted.abs().max()
        assert (actual.double() - wanted).abs().max() <= bound


def test_product_of_onednn_goes_through_function_transforms():
    x, weight, bias = (inputs(torch.float32)[name] for name in ('x', 'weight', 'bias'))
    both = (onednn_grad.Product.apply, F.linear)

    def per_sample(forward):
        return torch.func.vmap(torch.func.grad(lambda x: forward(x, weight, bias).square().mean()))(x)

    torch.testing.assert_close(*map(per_sample, both))
    with torch.no_grad():
        mapped = torch.func.vmap(lambda weight: onednn_grad.forward(x, weight, bias))(torch.stack([weight, -weight]))
    torch.testing.assert_close(mapped[1], F.linear(x, -weight, bias))
    torch.testing.assert_close(*[torch.func.jvp(f, (x[0], weight, bias), (x[1], weight, bias)) for f in both])
    without_bias = [torch.func.jvp(lambda x, f=f: f(x, weight, None), (x[0],), (x[1],)) for f in both]
    torch.testing.assert_close(*without_bias)


@pytest.mark.parametrize('x', [torch.zeros(1000, IN, dtype=torch.bfloat16), torch.zeros(1000, IN + 1)])
def test_input_that_does_not_fit_is_told_as_pytorch_does(x):
    messages = []
    for forward in (F.linear, onednn_grad.forward):
        with pytest.raises(RuntimeError) as error:
            forward(x, torch.zeros(OUT, IN), None)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_product_of_onednn_computes_only_the_gradients_that_are_wanted():
    x, weight = inputs(torch.float32)['x'], inputs(torch.float32)['weight'].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        onednn_grad.forward(x, weight, None).sum().backward()
    assert weight.grad is not None
    assert counter.get_total_flops() == 2 * 2 * x.numel() * OUT  # forward, and the gradient of the weight


def test_builds_without_onednn_import_it_and_do_without(monkeypatch):
    monkeypatch.setattr(torch.ops, 'mkldnn', SimpleNamespace())
    importlib.reload(onednn_grad)
    assert onednn_grad.OPERATOR is None
    assert choose('auto', torch.zeros(8, 8), TRAINABLE) == 'reference'
    monkeypatch.undo()
    importlib.reload(onednn_grad)  # the formula is known, and not registered twice


@pytest.mark.parametrize('shape', [(IN,), (0, IN), (2, 0, IN), (2, 3, 50, IN)])
def test_shapes_are_those_of_a_linear_layer(shape):
    _, weight, bias = (inputs(torch.float32)[name] for name in ('x', 'weight', 'bias'))
    for name in TRAINABLE:
        assert IMPLEMENTATIONS[name].forward(torch.zeros(shape), weight, bias).shape == (*shape[:-1], OUT)


def test_onednn_with_gradients_is_left_out_where_it_does_not_pay(monkeypatch):
    assert choose('auto', torch.zeros(8, 8), TRAINABLE) == 'onednn_grad'
    assert choose('auto', torch.zeros(8, 8).bfloat16(), TRAINABLE) == 'reference'  # oneDNN all the same
    monkeypatch.undo()
    for cpu, chosen in [
            ({'cpu_name': 'AMD EPYC', 'avx512_f': True}, 'onednn_grad'),
            ({'cpu_name': 'AMD EPYC', 'avx512_f': False}, 'reference'),
            ({'cpu_name': 'Intel(R) Xeon(R)', 'avx512_f': True}, 'reference'),
            ({}, 'reference'),
    ]:
        onednn_grad.why_not_here.cache_clear()
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda cpu=cpu: cpu, raising=False)
        assert choose('auto', torch.zeros(8, 8), TRAINABLE) == chosen
    monkeypatch.delattr(torch.cpu, 'get_capabilities')
    onednn_grad.why_not_here.cache_clear()
    assert 'does not know the name of the CPU' in onednn_grad.why_not(torch.zeros(8, 8))
    onednn_grad.why_not_here.cache_clear()


def test_auto_takes_what_can_run():
    assert choose('auto', torch.zeros(8, 8)) == 'onednn'
    assert choose('auto', torch.zeros(8, 8, dtype=torch.float64)) == 'reference'
    assert choose('auto', torch.zeros(8, 8, device='meta')) == 'reference'
    assert choose('reference', torch.zeros(8, 8)) == 'reference'


def test_what_cannot_run_is_refused_aloud():
    with pytest.raises(RuntimeError, match="linear 'onednn' cannot run: it cannot multiply torch.float64 on this CPU"):
        choose('onednn', torch.zeros(8, 8, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="linear 'onednn' cannot run: it is for the CPU, and the weight is on meta"):
        choose('onednn', torch.zeros(8, 8, device='meta'))
    with pytest.raises(ValueError, match="'mkl9' is unknown, choose one of: auto, onednn, onednn_grad, reference"):
        choose('mkl9', torch.zeros(8, 8))


def test_onednn_can_be_switched_off():
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        assert choose('auto', torch.zeros(8, 8)) == 'reference'
    finally:
        torch.backends.mkldnn.enabled = enabled


def test_reference_is_differentiable_for_compilers():
    x = torch.randn(2, IN, requires_grad=True)
    reference.forward(x, torch.randn(OUT, IN), None, 'gelu').sum().backward()
    assert x.grad is not None

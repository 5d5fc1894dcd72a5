"""Every implementation of attention against float64, values and gradients; and the rules for choosing one."""
import importlib

import pytest
import torch
from timm.layers import set_fused_attn
from timm_itpn.ops.attention.kernels import record_kernels
from torch.utils._python_dispatch import TorchDispatchMode

from timm_itpn.layers.rel_pos_bias import bias_of_table
from timm_itpn.ops.attention import IMPLEMENTATIONS, choose, flex, reference

B, HEADS, N, DIM = 2, 3, 37, 64


@pytest.fixture(autouse=True)
def flex_uncompiled(monkeypatch):
    """The same operator without its compiler, which would take 20 s for each type; one test below compiles it."""
    package = importlib.import_module('torch.nn.attention.flex_attention')
    monkeypatch.setattr(package, '_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG', True, raising=False)
    monkeypatch.setattr(flex, 'compiled', lambda: package.flex_attention)


def run(forward, dtype, with_bias, device='cpu', backward=True):
    """Output and gradients, as float64."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(B, HEADS, N, DIM, generator=generator, dtype=torch.float64) for _ in 'qkv']
    if with_bias:
        leaves.append(torch.randn(1, HEADS, N, N, generator=generator, dtype=torch.float64))
    # rounded first, so that all types start from the same numbers
    leaves = [leaf.bfloat16().to(device, dtype).requires_grad_(backward) for leaf in leaves]
    output = forward(*leaves[:3], leaves[3] if with_bias else None)
    if not backward:
        return [output.double()]
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64).bfloat16().to(device, dtype)
    output.backward(upstream)
    return [t.double() for t in (output.detach(), *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize('with_bias', [False, True], ids=['plain', 'bias'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_agrees_with_float64_as_well_as_eager_does(name, dtype, with_bias):
    if IMPLEMENTATIONS[name].why_not():
        pytest.skip(IMPLEMENTATIONS[name].why_not())
    backward = name != 'flex'  # it has none on the CPU
    check(run(IMPLEMENTATIONS[name].forward, dtype, with_bias, backward=backward), dtype, with_bias)


@pytest.mark.gpu
@pytest.mark.parametrize('with_bias', [False, True], ids=['plain', 'bias'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_agrees_with_float64_as_well_as_eager_does_on_cuda(monkeypatch, name, dtype, with_bias):
    monkeypatch.undo()  # flex compiled
    check(run(IMPLEMENTATIONS[name].forward, dtype, with_bias, 'cuda'), dtype, with_bias, 'cuda')


def check(actual, dtype, with_bias, device='cpu'):
    """Values and gradients differ from float64 at most twice as much as those of plain maths in `dtype`."""
    exact = run(reference.forward, torch.float64, with_bias, device)
    eager = run(naive, dtype, with_bias, device)
    for e, n, a in zip(exact, eager, actual):
        rounding = 8 * torch.finfo(torch.float64).eps * e.abs().max()  # of the yardstick itself
        assert (a - e).abs().max() <= 2 * (n - e).abs().max() + rounding


def naive(q, k, v, bias):
    scores = q @ k.transpose(-2, -1) * DIM ** -0.5
    return (scores if bias is None else scores + bias).softmax(-1) @ v


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_scale_takes_the_place_of_the_usual_one(name):
    q, k, v = (torch.randn(B, HEADS, N, DIM) for _ in 'qkv')
    forward = IMPLEMENTATIONS[name].forward
    torch.testing.assert_close(forward(q, k, v, scale=1.), forward(q * DIM ** 0.5, k, v))


@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_flex_looks_up_a_table_of_offsets(monkeypatch, compiled):
    if flex.why_not():
        pytest.skip(flex.why_not())
    if compiled:
        monkeypatch.undo()
    height, width = 3, 5
    q, k, v = (torch.randn(B, HEADS, height * width, DIM) for _ in 'qkv')
    table = torch.randn(2 * height - 1, 2 * width - 1, HEADS)
    bias = bias_of_table(table.reshape(-1, HEADS), height, width)[..., :height * width]
    torch.testing.assert_close(flex.forward(q, k, v, table), reference.forward(q, k, v, bias))


def test_flex_refuses_dropout():
    q = torch.zeros(1, 1, 4, DIM)
    with pytest.raises(RuntimeError, match='FlexAttention has no dropout: use attn_drop_rate=0'):
        flex.forward(q, q, q, dropout_p=0.1)


@pytest.mark.parametrize('name', [name for name in IMPLEMENTATIONS if name != 'flex'])
def test_dropout_drops_weights_and_keeps_the_mean(name):
    torch.manual_seed(0)
    q = k = torch.zeros(64, 1, 32, DIM)
    v = torch.ones(64, 1, 32, DIM)
    output = IMPLEMENTATIONS[name].forward(q, k, v, None, 0.5)
    assert output.mean().item() == pytest.approx(1., abs=0.02)
    assert output.std() > 0.1


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return output


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_fused_path_makes_no_score_matrix(dtype):
    tokens = 1024
    q, k, v = (torch.randn(1, 2, tokens, DIM, dtype=dtype, requires_grad=True) for _ in 'qkv')
    sizes = {}
    for name in ('sdpa', 'reference'):
        with LargestTensor() as largest:
            IMPLEMENTATIONS[name].forward(q, k, v).sum().backward()
        sizes[name] = largest.numel
    assert sizes['sdpa'] <= 2 * tokens * DIM
    assert sizes['reference'] >= 2 * tokens * tokens


@pytest.mark.parametrize('name, kernel', [('sdpa', 'flash'), ('reference', 'maths')])
def test_kernel_that_ran_can_be_asked(name, kernel):
    q = torch.randn(B, HEADS, N, DIM)
    with record_kernels() as kernels:
        IMPLEMENTATIONS[name].forward(q, q, q)
    assert kernels.names == [kernel]


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="attention 'flash9' is unknown, choose one of: auto, sdpa, reference, flex"):
        choose('flash9')


def test_auto_follows_timm_and_an_explicit_choice_is_refused_aloud():
    assert choose() == 'sdpa'
    set_fused_attn(False)
    try:
        assert choose() == 'reference'
        with pytest.raises(RuntimeError, match="attention 'sdpa' cannot run: timm has fused attention off"):
            choose('sdpa')
    finally:
        set_fused_attn(True)

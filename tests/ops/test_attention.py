"""Every implementation of attention against float64, values and gradients; and the rules for choosing one."""
import pytest
import torch
from timm.layers import set_fused_attn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_itpn.ops.attention import IMPLEMENTATIONS, choose, reference

B, HEADS, N, DIM = 2, 3, 37, 64


def run(forward, dtype, with_bias):
    """Output and gradients, as float64."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(B, HEADS, N, DIM, generator=generator, dtype=torch.float64) for _ in 'qkv']
    if with_bias:
        leaves.append(torch.randn(1, HEADS, N, N, generator=generator, dtype=torch.float64))
    # rounded first, so that all types start from the same numbers
    leaves = [leaf.bfloat16().to(dtype).requires_grad_() for leaf in leaves]
    output = forward(*leaves[:3], leaves[3] if with_bias else None)
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64).bfloat16().to(dtype)
    output.backward(upstream)
    return [t.double() for t in (output.detach(), *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize('with_bias', [False, True], ids=['plain', 'bias'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_agrees_with_float64_as_well_as_eager_does(name, dtype, with_bias):
    exact = run(reference.forward, torch.float64, with_bias)
    eager = run(naive, dtype, with_bias)
    actual = run(IMPLEMENTATIONS[name].forward, dtype, with_bias)
    for e, n, a in zip(exact, eager, actual):
        rounding = 8 * torch.finfo(torch.float64).eps * e.abs().max()  # of the yardstick itself
        assert (a - e).abs().max() <= 2 * (n - e).abs().max() + rounding


def naive(q, k, v, bias):
    scores = q @ k.transpose(-2, -1) * DIM ** -0.5
    return (scores if bias is None else scores + bias).softmax(-1) @ v


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
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
    for name, implementation in IMPLEMENTATIONS.items():
        with LargestTensor() as largest:
            implementation.forward(q, k, v).sum().backward()
        sizes[name] = largest.numel
    assert sizes['sdpa'] <= 2 * tokens * DIM
    assert sizes['reference'] >= 2 * tokens * tokens


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="attention 'flash9' is unknown, choose one of: auto, sdpa, reference"):
        choose('flash9')


def test_auto_follows_timm_and_an_explicit_choice_is_refused_aloud():
    assert choose() is IMPLEMENTATIONS['sdpa'].forward
    set_fused_attn(False)
    try:
        assert choose() is reference.forward
        with pytest.raises(RuntimeError, match="attention 'sdpa' cannot run: timm has fused attention off"):
            choose('sdpa')
    finally:
        set_fused_attn(True)

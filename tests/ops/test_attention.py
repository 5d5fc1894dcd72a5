"""Fused attention and plain maths against float64, values and gradients; and the rules for choosing one."""
import pytest
import torch
from timm.layers import set_fused_attn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_itpn.ops.attention import (
    IMPLEMENTATIONS,
    attention_weights,
    choose_attention,
    fused_attention,
    record_kernels,
)

B, HEADS, N, DIM = 2, 3, 37, 64


def plain(q, k, v, bias=None, scale=None):
    return attention_weights(q, k, bias, scale).type_as(v) @ v


FORWARD = {'sdpa': fused_attention, 'reference': plain}
every_implementation = pytest.mark.parametrize('name', IMPLEMENTATIONS)


def run(forward, dtype, with_bias, device):
    """Output and gradients, as float64."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(B, HEADS, N, DIM, generator=generator, dtype=torch.float64) for _ in 'qkv']
    if with_bias:
        leaves.append(torch.randn(1, HEADS, N, N, generator=generator, dtype=torch.float64))
    # rounded first, so that all types start from the same numbers
    leaves = [leaf.bfloat16().to(device, dtype).requires_grad_() for leaf in leaves]
    output = forward(*leaves[:3], leaves[3] if with_bias else None)
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64).bfloat16().to(device, dtype)
    output.backward(upstream)
    return [t.double() for t in (output.detach(), *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize('with_bias', [False, True], ids=['plain', 'bias'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
@every_implementation
def test_agrees_with_float64_as_well_as_eager_does(name, device, dtype, with_bias):
    def eager(q, k, v, bias):
        scores = q @ k.transpose(-2, -1) * DIM ** -0.5
        return (scores if bias is None else scores + bias).softmax(-1) @ v

    for exact, yardstick, actual in zip(
            run(eager, torch.float64, with_bias, device),
            run(eager, dtype, with_bias, device),
            run(FORWARD[name], dtype, with_bias, device),
    ):
        rounding = 8 * torch.finfo(torch.float64).eps * exact.abs().max()  # of float64 itself
        assert (actual - exact).abs().max() <= 3 * (yardstick - exact).abs().max() + rounding


@every_implementation
def test_scale_takes_the_place_of_the_usual_one(name):
    q, k, v = (torch.randn(B, HEADS, N, DIM) for _ in 'qkv')
    torch.testing.assert_close(FORWARD[name](q, k, v, scale=1.), FORWARD[name](q * DIM ** 0.5, k, v))


def test_many_keys_on_the_cpu_are_as_few():
    q, k, v = (torch.randn(1, 2050, 2, 16).transpose(1, 2) for _ in 'qkv')  # as from a packed projection
    torch.testing.assert_close(fused_attention(q[:, :, :8], k, v), plain(q[:, :, :8], k, v))


def test_dropout_drops_weights_and_keeps_the_mean():
    torch.manual_seed(0)
    q = k = torch.zeros(64, 1, 32, DIM)
    output = fused_attention(q, k, torch.ones(64, 1, 32, DIM), None, 0.5)
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
    for name, forward in FORWARD.items():
        with LargestTensor() as largest:
            forward(q, k, v).sum().backward()
        sizes[name] = largest.numel
    assert sizes['sdpa'] <= 2 * tokens * DIM
    assert sizes['reference'] >= 2 * tokens * tokens


@pytest.mark.parametrize('name, kernel', [('sdpa', 'flash'), ('reference', 'maths')])
def test_kernel_that_ran_can_be_asked(name, kernel):
    q = torch.randn(B, HEADS, N, DIM)
    with record_kernels() as kernels:
        FORWARD[name](q, q, q)
    assert kernels.names == [kernel]


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="attn_impl 'flash9' is unknown, use one of: auto, sdpa, reference"):
        choose_attention('flash9')


def test_auto_follows_timm_and_an_explicit_choice_is_refused_aloud():
    assert choose_attention() == 'sdpa'
    set_fused_attn(False)
    try:
        assert choose_attention() == 'reference'
        with pytest.raises(RuntimeError, match="attn_impl 'sdpa' cannot run: timm has fused attention off"):
            choose_attention('sdpa')
    finally:
        set_fused_attn(True)

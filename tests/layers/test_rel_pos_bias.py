"""Relative position bias: its definition, resampling, what is kept between calls, and attention with it."""
import pytest
import timm.layers
import torch
import torch.nn as nn

from timm_itpn.layers.rel_pos_bias import RelPosBias
from timm_itpn.ops.attention import attention_weights, fused_attention

GRIDS = [(14, 14), (24, 24), (9, 13)]  # 224 and 384 pixels, and a non-square size whose rows need padding
HEADS = 3


def rel_pos_bias(grid, dynamic=False, dtype=torch.float32):
    module = RelPosBias(grid, HEADS, dynamic, dtype=dtype)
    nn.init.normal_(module.relative_position_bias_table, generator=torch.Generator().manual_seed(0))
    return module


@pytest.mark.parametrize('grid', GRIDS)
def test_bias_is_the_table_at_the_offset(grid):
    height, width = grid
    module = rel_pos_bias(grid)
    bias = module(*grid)
    y, x = torch.arange(height), torch.arange(width)
    dy = (y[:, None] - y[None]) + height - 1
    dx = (x[:, None] - x[None]) + width - 1
    index = dy[:, None, :, None] * (2 * width - 1) + dx[None, :, None, :]  # (query y, query x, key y, key x)
    expected = module.relative_position_bias_table[index].permute(4, 0, 1, 2, 3)
    expected = expected.reshape(1, HEADS, height * width, height * width)
    assert torch.equal(bias, expected)


@pytest.mark.parametrize('grid', GRIDS)
def test_bias_is_that_of_timm(grid):
    module, theirs = rel_pos_bias(grid), timm.layers.RelPosBias(grid, HEADS)
    theirs.load_state_dict(module.state_dict())
    assert torch.equal(module(*grid), theirs.get_bias())


@pytest.mark.parametrize('grid', GRIDS)
def test_rows_are_aligned_for_the_kernels(grid):
    for mode in (True, False):
        bias = rel_pos_bias(grid).train(mode)(*grid)
        assert bias.stride(-1) == 1 and bias.stride(-2) % 8 == 0


@pytest.mark.parametrize('new', [(24, 24), (9, 13), (3, 20), (1, 1)])
def test_resizing_is_timms_and_dynamic_size_agrees(new):
    module = rel_pos_bias((14, 14))
    dynamic = rel_pos_bias((14, 14), dynamic=True)
    theirs = timm.layers.RelPosBias((14, 14), HEADS)
    theirs.load_state_dict(module.state_dict())
    theirs.set_window_size(new)
    module.relative_position_bias_table.requires_grad_(False)
    module.set_window_size(new)
    assert not module.relative_position_bias_table.requires_grad
    torch.testing.assert_close(
        module.relative_position_bias_table, theirs.relative_position_bias_table, rtol=1e-5, atol=1e-5)
    assert torch.equal(dynamic(*new), module(*new))


def test_gradient_of_dynamic_size_is_exact():
    table = torch.randn(5 * 7, 2, requires_grad=True)
    resample = torch.ops.timm_itpn.resampled_rel_pos_table
    grad = torch.randn(9 * 5, 2)
    actual, = torch.autograd.grad(resample(table, 5, 3, 3, 4), table, grad)
    units = torch.eye(table.numel()).reshape(-1, *table.shape)  # linear in the table: the responses are its matrix
    wanted = torch.stack([(resample(unit, 5, 3, 3, 4) * grad).sum() for unit in units])
    torch.testing.assert_close(actual, wanted.reshape(table.shape))


@pytest.mark.parametrize('dynamic', [False, True])
def test_bias_has_every_derivative(dynamic):
    module = rel_pos_bias((2, 3), dynamic, torch.float64)

    def bias(table):
        return torch.func.functional_call(module, {'relative_position_bias_table': table}, (3, 4))

    table = module.relative_position_bias_table.detach().requires_grad_()
    assert torch.autograd.gradcheck(bias, table, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(bias, table)
    jacobian = torch.func.jacrev(bias)(table)
    torch.testing.assert_close(torch.func.jacfwd(bias)(table), jacobian)
    torch.testing.assert_close(torch.func.vmap(bias)(table.expand(2, -1, -1)), bias(table).expand(2, -1, -1, -1, -1))


@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor')  # opcheck looks at it
def test_operator_keeps_pytorchs_rules():
    table = torch.randn(27 * 27, 2, requires_grad=True)
    torch.library.opcheck(torch.ops.timm_itpn.resampled_rel_pos_table.default, (table, 9, 13, 14, 14))


def test_bias_between_some_tokens_is_a_part_of_the_whole():
    module = rel_pos_bias((4, 6))
    queries, keys = torch.tensor([[[3, 17, 24]]]), torch.tensor([[[0, 24, 5, 23]]])  # 24: a token without position
    bias = module(4, 6, queries, keys)
    whole = nn.functional.pad(module(4, 6), (0, 1, 0, 1))[0]
    assert torch.equal(bias[0, 0], whole[:, queries[0, 0]][:, :, keys[0, 0]])


# attention with it

@pytest.mark.parametrize('grid', GRIDS)
def test_attention_with_bias_agrees_in_value_and_in_the_tables_gradient(grid):
    """Fused attention against float64, from which it may differ twice as much as plain float32 maths."""
    torch.manual_seed(0)
    shape = (2, HEADS, grid[0] * grid[1], 16)
    qkv, weight = [torch.randn(shape, dtype=torch.float64) for _ in range(3)], torch.randn(shape, dtype=torch.float64)

    def plain(q, k, v, bias):
        return attention_weights(q, k, bias).type_as(v) @ v

    def run(forward, dtype):
        module = rel_pos_bias(grid, dtype=dtype)
        out = forward(*[x.to(dtype) for x in qkv], module(*grid))
        (out * weight.to(dtype)).sum().backward()
        return [out.detach().double(), module.relative_position_bias_table.grad.double()]

    exact = run(plain, torch.float64)
    for yardstick, actual, wanted in zip(run(plain, torch.float32), run(fused_attention, torch.float32), exact):
        assert (actual - wanted).abs().max() <= 2 * (yardstick - wanted).abs().max() + 1e-6
    torch.testing.assert_close(run(fused_attention, torch.float64), exact)


def test_bias_in_attention_is_shared_by_all_samples():
    bias = rel_pos_bias((4, 6))(4, 6)
    assert bias.shape == (1, HEADS, 24, 24)


# what is kept between calls; that outputs are those of the weights: tests/models/test_state.py

def test_bias_is_kept_in_evaluation_only_and_follows_size_and_type():
    module = rel_pos_bias((4, 6), dynamic=True).eval()
    with torch.no_grad():
        first = module(4, 6)
        assert module(4, 6) is first
        assert module(6, 4).shape == (1, HEADS, 24, 24) and not torch.equal(module(6, 4), first)
        assert torch.equal(module(4, 6), first)
        assert module.train()(4, 6) is not module(4, 6)
        assert module.eval().to(torch.bfloat16)(4, 6).dtype == torch.bfloat16


def test_gradients_reach_the_table_in_evaluation_too():
    module = rel_pos_bias((4, 6)).eval()
    with torch.no_grad():
        module(4, 6)
    module(4, 6).sum().backward()
    assert module.relative_position_bias_table.grad.sum() == HEADS * 24 * 24


def test_large_bias_is_not_kept(monkeypatch):
    monkeypatch.setattr('timm_itpn.layers.rel_pos_bias.MAX_CACHED', 100)
    module = rel_pos_bias((4, 6)).eval()
    with torch.no_grad():
        assert module(4, 6) is not module(4, 6)

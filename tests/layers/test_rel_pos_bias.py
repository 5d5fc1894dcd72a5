"""Relative position bias: its definition, resampling, what is kept between calls, and attention with it."""
import copy
import io
import pickle

import pytest
import timm.layers
import torch
import torch.nn as nn

from timm_itpn.layers import RelPosBias
from timm_itpn.ops.attention import IMPLEMENTATIONS, reference

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
    resampled_bias = torch.ops.timm_itpn.resampled_rel_pos_bias
    grad = torch.randn(1, 2, 15, 16)
    actual, = torch.autograd.grad(resampled_bias(table, 5, 3, 3, 4), table, grad)
    columns = []
    for i in range(table.numel()):  # linear in the table: the response to each entry is a column of its matrix
        unit = torch.zeros(table.numel())
        unit[i] = 1.
        columns.append((resampled_bias(unit.reshape(table.shape), 5, 3, 3, 4) * grad).sum())
    torch.testing.assert_close(actual, torch.stack(columns).reshape(table.shape))


def test_operator_keeps_pytorchs_rules():
    table = torch.randn(27 * 27, 2, requires_grad=True)
    torch.library.opcheck(torch.ops.timm_itpn.resampled_rel_pos_bias.default, (table, 9, 13, 14, 14))


# attention with it

@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('name', [name for name in IMPLEMENTATIONS if name != 'flex'])  # it has no backward on CPUs
def test_attention_with_bias_agrees_in_value_and_in_the_tables_gradient(name, grid):
    """Every implementation against float64, which may err twice as much as plain float32 maths."""
    torch.manual_seed(0)
    shape = (2, HEADS, grid[0] * grid[1], 16)
    qkv, weight = [torch.randn(shape, dtype=torch.float64) for _ in range(3)], torch.randn(shape, dtype=torch.float64)

    def run(forward, dtype):
        module = rel_pos_bias(grid, dtype=dtype)
        out = forward(*[x.to(dtype) for x in qkv], module(*grid))
        (out * weight.to(dtype)).sum().backward()
        return [out.detach().double(), module.relative_position_bias_table.grad.double()]

    exact = run(reference.forward, torch.float64)
    for yardstick, actual, wanted in zip(run(reference.forward, torch.float32),
                                         run(IMPLEMENTATIONS[name].forward, torch.float32), exact):
        assert (actual - wanted).abs().max() <= 2 * (yardstick - wanted).abs().max() + 1e-6
    for actual, wanted in zip(run(IMPLEMENTATIONS[name].forward, torch.float64), exact):
        torch.testing.assert_close(actual, wanted)


def test_bias_in_attention_is_shared_by_all_samples():
    bias = rel_pos_bias((4, 6))(4, 6)
    assert bias.shape == (1, HEADS, 24, 24)


# what is kept between calls

def computations(module, monkeypatch):
    count = []
    compute = module._compute
    monkeypatch.setattr(module, '_compute', lambda *size: count.append(size) or compute(*size))
    return count


def test_bias_is_computed_once_per_weights_in_evaluation(monkeypatch):
    module = rel_pos_bias((4, 6)).eval()
    count = computations(module, monkeypatch)
    with torch.no_grad():
        first = module(4, 6)
        assert module(4, 6) is first and len(count) == 1
        module.relative_position_bias_table.add_(1.)
        torch.testing.assert_close(module(4, 6), first + 1.)
    with torch.inference_mode():
        torch.testing.assert_close(module(4, 6), first + 1.)
    assert len(count) == 2


def test_bias_is_computed_in_every_forward_in_training(monkeypatch):
    module = rel_pos_bias((4, 6)).train()
    count = computations(module, monkeypatch)
    with torch.no_grad():
        module(4, 6), module(4, 6)
    assert len(count) == 2


@pytest.mark.parametrize('change', ['load', 'dtype', 'replace', 'size', 'optimizer', 'train'])
def test_kept_bias_follows_the_table(change):
    module = rel_pos_bias((4, 6), dynamic=change == 'size').eval()
    grid = (4, 6)
    with torch.no_grad():
        module(*grid)
    table = module.relative_position_bias_table
    if change == 'load':
        module.load_state_dict({'relative_position_bias_table': torch.randn_like(table)})
    elif change == 'dtype':
        module.to(torch.bfloat16)
    elif change == 'replace':
        module.relative_position_bias_table = nn.Parameter(torch.randn_like(table))
    elif change == 'size':
        grid = (6, 4)
    elif change == 'optimizer':
        module(*grid).sum().backward()
        torch.optim.AdamW(module.parameters()).step()
    elif change == 'train':
        module.train()
        table.data.normal_()  # goes unnoticed by version counters
        module.eval()
    with torch.no_grad():
        actual = module(*grid)
        expected = module._compute(*grid)
    assert actual.dtype == expected.dtype and torch.equal(actual, expected)


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


def test_copies_and_pickles_leave_the_bias_behind():
    module = rel_pos_bias((4, 6)).eval()
    with torch.no_grad():
        expected = module(4, 6)
        for twin in (copy.deepcopy(module), pickle.load(io.BytesIO(pickle.dumps(module)))):
            assert twin._cache is None
            twin.relative_position_bias_table.mul_(2.)
            torch.testing.assert_close(twin(4, 6), 2 * expected)
        assert module(4, 6) is expected


def test_functional_call_uses_the_parameters_it_is_given():
    module = rel_pos_bias((4, 6)).eval()
    table = torch.randn_like(module.relative_position_bias_table)
    with torch.no_grad():
        module(4, 6)
        actual = torch.func.functional_call(module, {'relative_position_bias_table': table}, (4, 6))
        module.load_state_dict({'relative_position_bias_table': table})
        assert torch.equal(actual, module(4, 6))

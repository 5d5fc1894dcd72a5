"""The ceiling: all shapes run, and the rate follows from their times and counts."""
import types

import pytest
import torch

from timm_itpn.bench import ceiling
from timm_itpn.bench.ceiling import Ceiling
from timm_itpn.bench.flops import Product

A, B = Product(8, 16, 32), Product(4, 8, 8)


@pytest.fixture
def ways(monkeypatch):
    """What `ops.linear` has to offer."""
    table = {}
    monkeypatch.setattr(ceiling, 'IMPLEMENTATIONS', table)
    return table


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_each_shape_is_a_product_in_memory_that_is_there(dtype, ways, monkeypatch):
    seen = []
    mm = torch.mm

    def spy(x, weight, out):
        seen.append((x.shape[0], *weight.shape, out.shape, {x.dtype, weight.dtype, out.dtype}))
        return mm(x, weight, out=out)

    monkeypatch.setattr(torch, 'mm', spy)
    calls = Ceiling({A: 3, B: 1}, dtype, 'cpu').calls
    assert list(calls) == [(A, 'mm'), (B, 'mm')]
    calls[A, 'mm']()
    assert seen[-1] == (*A, (A.rows, A.columns), {dtype})


def test_rate_weighs_times_by_counts(ways, monkeypatch):
    monkeypatch.setattr(ceiling, 'calls_for', lambda call, device: 10)
    rate = Ceiling({A: 3, B: 1}, torch.float32, 'cpu').rate
    times_ms = {(A, 'mm'): [20, 30, 1000], (B, 'mm'): [10, 10, 10]}  # of ten calls
    assert rate(times_ms) == pytest.approx((3 * A.flops + B.flops) / (3 * 0.003 + 0.001))


def test_each_shape_counts_in_its_fastest_way(ways, monkeypatch):
    packed = []
    ways['packed'] = types.SimpleNamespace(
        why_not=lambda weight: None, pack=packed.append, forward=lambda x, weight, bias: x)
    ways['elsewhere'] = types.SimpleNamespace(why_not=lambda weight: 'no such device')
    ways['reference'] = types.SimpleNamespace(why_not=lambda weight: None)
    monkeypatch.setattr(ceiling, 'calls_for', lambda call, device: 1)
    rate = Ceiling({A: 1, B: 1}, torch.float32, 'cpu').rate
    assert [weight.shape for weight in packed] == [(A.columns, A.inner), (B.columns, B.inner)]
    times_ms = {(A, 'mm'): [4], (A, 'packed'): [2], (B, 'mm'): [1], (B, 'packed'): [3], 'ours': [9]}
    assert rate(times_ms) == pytest.approx((A.flops + B.flops) / 0.003)
    assert rate(times_ms, ways=('mm',)) == pytest.approx((A.flops + B.flops) / 0.005)


def test_all_ways_that_can_run_here_do():
    for call in Ceiling({A: 1}, torch.float32, 'cpu').calls.values():
        call()


def test_short_calls_run_several_times(monkeypatch):
    times = iter([0, 0.001, 0, 0.5, 0, 0])
    monkeypatch.setattr(ceiling, 'wait', lambda device: next(times))
    counts = [ceiling.calls_for(lambda: None, 'cpu') for _ in range(3)]
    assert counts == [5, 1, ceiling.MOST_CALLS]
    calls = []
    ceiling.repeated(lambda: calls.append(1), 5)()
    assert len(calls) == 5

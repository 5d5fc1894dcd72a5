"""The ceiling: all implementations run, and the rate follows from their times and counts."""
import types

import pytest
import torch

from timm_itpn.bench import ceiling
from timm_itpn.bench.ceiling import Ceiling
from timm_itpn.bench.flops import Product

A, B = Product(8, 16, 32), Product(4, 8, 8)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_all_implementations_that_can_run_here_do(dtype):
    calls = Ceiling({A: 1, B: 2}, dtype, 'cpu').calls
    assert len(calls) >= 2
    for call in calls.values():
        call()


def test_each_product_counts_in_its_fastest_implementation(monkeypatch):
    monkeypatch.setattr(ceiling, 'IMPLEMENTATIONS', {
        'packed': types.SimpleNamespace(
            why_not=lambda weight: None, pack=lambda weight: weight, forward=lambda x, weight, bias: x),
        'elsewhere': types.SimpleNamespace(why_not=lambda weight: 'no such device'),
        'reference': types.SimpleNamespace(why_not=lambda weight: None),
    })
    monkeypatch.setattr(ceiling, '_MOST_REPEATS', 10)
    measured = Ceiling({A: 3, B: 1}, torch.float32, 'cpu')
    mm_a, packed_a, mm_b, packed_b = measured.calls
    times_ms = {mm_a: [40, 41, 1000], packed_a: [19, 20, 21], mm_b: [10], packed_b: [30], 'ours': [9]}  # of ten calls
    flops = 3 * A.flops + B.flops
    assert measured.rates(times_ms) == pytest.approx((flops / (3 * 0.002 + 0.001), flops / (3 * 0.0041 + 0.001)))

"""The ceiling: all implementations run, and the rate follows from their times and counts."""
import pytest
import torch

from timm_itpn.bench.ceiling import TimedProduct, product_calls, rates
from timm_itpn.bench.flops import Product

A, B = Product(8, 16, 32), Product(4, 8, 8)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_all_implementations_that_can_run_here_do(dtype):
    calls = product_calls({A: 1, B: 2}, dtype, 'cpu')
    assert {key.product for key in calls if key.implementation == 'mm' and key.repeats > 1} == {A, B}
    for call in calls.values():
        call()


def test_each_product_counts_in_its_fastest_implementation():
    times_ms = {  # of ten calls
        TimedProduct(A, 'mm', 10): [40, 41, 1000], TimedProduct(A, 'packed', 10): [19, 20, 21],
        TimedProduct(B, 'mm', 10): [10], TimedProduct(B, 'packed', 10): [30]}
    flops = 3 * A.flops + B.flops
    assert rates({A: 3, B: 1}, times_ms) == pytest.approx(
        (flops / (3 * 0.002 + 0.001), flops / (3 * 0.0041 + 0.001)))

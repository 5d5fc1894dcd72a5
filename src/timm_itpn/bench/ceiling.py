"""The machine's ceiling: the rate of plain matrix products in the shapes that the model has.

Each shape counts with the faster implementation: `torch.mm`, or that of oneDNN, whose weights are packed.
"""
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch

from ..ops.linear import can_use_onednn, onednn_linear, pack_for_onednn
from .flops import Product

__all__ = ['TimedProduct', 'product_calls', 'rates']

_MM = 'mm'
_TARGET_FLOPS = {'cpu': 2e8, 'cuda': 1e11}  # of a timed call: a millisecond, of which starting it is a small share
_MOST_REPEATS = 200


class TimedProduct(NamedTuple):
    """What one timed call computes."""
    product: Product
    implementation: str
    repeats: int


def product_calls(
        products: Mapping[Product, int], dtype: torch.dtype, device: str) -> dict[TimedProduct, Callable[[], None]]:
    """What to time: each product, rows times the transpose of a weight, in each implementation that can run.

    Args:
        products: Shapes, and how often the model has each.
        dtype: Type that the model computes in.
        device: 'cpu' or 'cuda'.
    """
    calls = {}
    for product in products:
        x = torch.randn(product.rows, product.inner, dtype=dtype, device=device)
        weight = torch.randn(product.columns, product.inner, dtype=dtype, device=device)
        out = torch.empty(product.rows, product.columns, dtype=dtype, device=device)
        once: dict[str, Callable[[], object]] = {_MM: partial(torch.mm, x, weight.t(), out=out)}
        if can_use_onednn(weight):
            once['onednn'] = partial(onednn_linear, x, pack_for_onednn(weight), None)
        repeats = max(1, min(_MOST_REPEATS, round(_TARGET_FLOPS[device] / product.flops)))
        calls.update({TimedProduct(product, name, repeats): _repeated(call, repeats) for name, call in once.items()})
    return calls


def rates(products: Mapping[Product, int], times_ms: Mapping[TimedProduct, list[float]]) -> tuple[float, float]:
    """Operations per second over all products of the model: each in its fastest implementation, and by `torch.mm`.

    Args:
        products: As for `product_calls`.
        times_ms: Times of each of its calls in each round.
    """
    seconds: dict[Product, dict[str, float]] = {product: {} for product in products}
    for (product, name, repeats), times in times_ms.items():
        seconds[product][name] = products[product] * statistics.median(times) / 1000 / repeats
    flops = sum(product.flops * count for product, count in products.items())
    fastest_s = sum(min(by_name.values()) for by_name in seconds.values())
    return flops / fastest_s, flops / sum(by_name[_MM] for by_name in seconds.values())


def _repeated(call: Callable[[], object], repeats: int) -> Callable[[], None]:
    @torch.inference_mode()
    def calls() -> None:
        for _ in range(repeats):
            call()
    return calls

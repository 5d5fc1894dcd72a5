"""The machine's ceiling: the rate of plain matrix products in the shapes that the model has.

Each shape counts with the fastest implementation there is: `torch.mm`, or one of `ops.linear`, whose weights may be
packed.
"""
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from ..ops.linear import IMPLEMENTATIONS
from .flops import Product

__all__ = ['Ceiling']

_MM = 'mm'
_TARGET_FLOPS = {'cpu': 2e8, 'cuda': 1e11}  # of a timed call: a millisecond, of which starting it is a small share
_MOST_REPEATS = 200

Call = Callable[[], object]


class _Timed(NamedTuple):
    product: Product
    implementation: str
    repeats: int  # in one timed call


class Ceiling:
    """Matrix products of a model, each shape timed on its own.

    Args:
        products: Shapes, and how often the model has each.
        dtype: Type that the model computes in.
        device: 'cpu' or 'cuda'.

    Attributes:
        calls: What to time.
    """

    def __init__(self, products: Mapping[Product, int], dtype: torch.dtype, device: str):
        self.products = products
        self.calls: dict[str, Call] = {}
        self._timed: dict[str, _Timed] = {}
        for product in products:
            repeats = max(1, min(_MOST_REPEATS, round(_TARGET_FLOPS[device] / product.flops)))
            for name, call in _implementations(product, dtype, device).items():
                self.calls[f'{name} {product}'] = _repeated(call, repeats)
                self._timed[f'{name} {product}'] = _Timed(product, name, repeats)

    def rates(self, times_ms: Mapping[str, list[float]]) -> tuple[float, float]:
        """Operations per second over all products of the model: each in its fastest implementation, and by `torch.mm`.

        Args:
            times_ms: Times of each of `calls` in each round.
        """
        fastest_s: dict[Product, float] = {}
        mm_s = 0.
        for key, (product, name, repeats) in self._timed.items():
            seconds = self.products[product] * statistics.median(times_ms[key]) / 1000 / repeats
            fastest_s[product] = min(seconds, fastest_s.get(product, seconds))
            mm_s += seconds if name == _MM else 0.
        flops = sum(product.flops * count for product, count in self.products.items())
        return flops / sum(fastest_s.values()), flops / mm_s


def _implementations(product: Product, dtype: torch.dtype, device: str) -> dict[str, Call]:
    """One product as in a linear layer, rows times the transpose of a weight, in each implementation that can run."""
    x = torch.randn(product.rows, product.inner, dtype=dtype, device=device)
    weight = torch.randn(product.columns, product.inner, dtype=dtype, device=device)
    out = torch.empty(product.rows, product.columns, dtype=dtype, device=device)
    calls: dict[str, Call] = {_MM: lambda: torch.mm(x, weight.t(), out=out)}
    for name, implementation in IMPLEMENTATIONS.items():
        if name != 'reference' and implementation.why_not(weight) is None:
            calls[name] = _packed(x, implementation.pack(weight), implementation.forward)
    return calls


def _packed(x: torch.Tensor, packed: torch.Tensor, forward: Callable[..., object]) -> Call:
    def call() -> object:
        with torch.inference_mode():
            return forward(x, packed, None)
    return call


def _repeated(call: Call, repeats: int) -> Call:
    def calls() -> None:
        for _ in range(repeats):
            call()
    return calls

"""The machine's ceiling: the rate of plain matrix products in the shapes that the model has.

Each shape counts with the fastest way there is: `torch.mm`, or one of `ops.linear`, whose weights may be packed.
"""
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..ops.linear import IMPLEMENTATIONS
from .flops import Product

__all__ = ['Ceiling']

TARGET_S = 0.005  # a timed call lasts about that long at least, or starting it would count
MOST_CALLS = 200

Key = tuple[Product, str]


class Ceiling:
    """Matrix products of a model, each shape timed on its own.

    Args:
        products: Shapes, and how often the model has each.
        dtype: Type that the model computes in.
        device: 'cpu' or 'cuda'.
    """

    def __init__(self, products: dict[Product, int], dtype: torch.dtype, device: str):
        self.products = products
        self._single = {
            (product, way): call for product in products for way, call in ways_of(product, dtype, device).items()}
        self._num_calls = {key: calls_for(call, device) for key, call in self._single.items()}

    @property
    def calls(self) -> dict[Key, Callable[[], None]]:
        """What to time: for each shape and way, some calls in a row."""
        return {key: repeated(call, self._num_calls[key]) for key, call in self._single.items()}

    def rate(self, times_ms: Mapping[Any, list[float]], ways: Sequence[str] = ()) -> float:
        """Operations per second over all products of the model.

        Args:
            times_ms: Times of each of `calls` in each round.
            ways: Those that count, all if empty.
        """
        medians_ms: dict[Product, list[float]] = {product: [] for product in self.products}
        for (product, way), num_calls in self._num_calls.items():
            if not ways or way in ways:
                medians_ms[product].append(statistics.median(times_ms[product, way]) / num_calls)
        flops = sum(product.flops * count for product, count in self.products.items())
        return flops / sum(count * min(medians_ms[product]) / 1000 for product, count in self.products.items())


def ways_of(product: Product, dtype: torch.dtype, device: str) -> dict[str, Callable[[], Any]]:
    """One product as in a linear layer, rows times the transpose of a weight, in each way that can run."""
    options: Any = {'dtype': dtype, 'device': device}
    x = torch.randn(product.rows, product.inner, **options)
    weight = torch.randn(product.columns, product.inner, **options)
    out = torch.empty(product.rows, product.columns, **options)
    ways: dict[str, Callable[[], Any]] = {'mm': lambda: torch.mm(x, weight.t(), out=out)}
    for name, implementation in IMPLEMENTATIONS.items():
        if name != 'reference' and implementation.why_not(weight) is None:
            ways[name] = packed_call(x, implementation.pack(weight), implementation.forward)
    return ways


def packed_call(x: torch.Tensor, packed: torch.Tensor, forward: Callable[..., Any]) -> Callable[[], Any]:
    def call() -> Any:
        with torch.inference_mode():
            return forward(x, packed, None)
    return call


def repeated(call: Callable[[], Any], times: int) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(times):
            call()
    return calls


def calls_for(call: Callable[[], Any], device: str) -> int:
    """How many calls in a row last long enough to be timed."""
    call()
    start = wait(device)
    call()
    return max(1, min(MOST_CALLS, round(TARGET_S / max(wait(device) - start, 1e-9))))


def wait(device: str) -> float:
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter()

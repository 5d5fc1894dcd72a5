"""Operations of a model, and the machine's ceiling: the rate of plain matrix products in the shapes that it has.

Operations and shapes are found by running the model on the meta device, without data. In the ceiling each shape counts
with the faster implementation: `torch.mm`, or oneDNN's of `ops.linear`, whose weights are packed.
"""
import copy
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..ops.linear import can_use_onednn, onednn_linear, pack_for_onednn

Outputs = torch.Tensor | Sequence[torch.Tensor]  # logits, or the levels of a pyramid

_MM = 'mm'
_TARGET_FLOPS = {'cpu': 2e8, 'cuda': 1e11}  # of a timed call: a millisecond, of which starting it is a small share
_MOST_REPEATS = 200


class Product(NamedTuple):
    """A matrix product (rows, inner) x (inner, columns)."""
    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns


class TimedProduct(NamedTuple):
    """What one timed call computes."""
    product: Product
    implementation: str
    repeats: int


def training_loss(outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits (B, num_classes), or the sum of the mean squares of maps.

    Args:
        outputs: Logits, or maps.
        targets: Classes (B,), for logits.
    """
    if isinstance(outputs, torch.Tensor):
        return F.cross_entropy(outputs.float(), targets)
    return torch.stack([level.float().square().mean() for level in outputs]).sum()


def count_flops(model: nn.Module, images: torch.Tensor, backward: bool = False) -> int:
    """Floating-point operations of one call, a multiply-add counted as two.

    A model that cannot run without data runs with them. Attention is counted by its two products, whichever kernel
    would run. What gradient checkpointing computes again is counted, unless it is off in `model`.

    Args:
        model: (B, C, H, W) -> (B, num_classes), or a list of maps.
        images: Input; only its shape and type matter.
        backward: Count the backward pass of `training_loss` too.
    """
    counter = FlopCounterMode(display=False)
    try:
        with counter, sdpa_kernel(SDPBackend.MATH):
            _run(copy.deepcopy(model).to('meta'), images.to('meta'), backward)
    except (NotImplementedError, RuntimeError, TypeError):  # the meta device gave no data; other faults come up again
        with counter, sdpa_kernel(SDPBackend.MATH):
            _run(model, images, backward)
        model.zero_grad()
    return int(counter.get_total_flops())


def count_products(model: nn.Module, images: torch.Tensor) -> dict[Product, int]:
    """Matrix products of the linear and convolution layers in one forward pass, and how often each occurs.

    Those of attention are batched and do not count.
    """
    found: Counter[Product] = Counter()

    def matrices(*args: Any, **_: Any) -> int:
        a, b = args[-2:]  # before them, addmm has the bias
        found[Product(a[0], a[1], b[1])] += 1
        return 0

    def convolution(x: Any, weight: Any, *args: Any, out_shape: Any) -> int:
        rows, groups = out_shape[0] * math.prod(out_shape[2:]), args[-1]  # rows: images x positions
        found[Product(rows, math.prod(weight[1:]), weight[0] // groups)] += groups
        return 0

    aten = torch.ops.aten
    mapping = {aten.mm: matrices, aten.addmm: matrices, aten.convolution: convolution}
    with FlopCounterMode(display=False, custom_mapping=mapping), sdpa_kernel(SDPBackend.MATH):
        _run(copy.deepcopy(model).to('meta'), images.to('meta'), False)
    return dict(found)


def _run(model: Callable[[torch.Tensor], Outputs], images: torch.Tensor, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        outputs = model(images)
        if backward:
            training_loss(outputs, torch.zeros(len(images), dtype=torch.long, device=images.device)).backward()


def product_calls(
        products: Mapping[Product, int], dtype: torch.dtype, device: str) -> dict[TimedProduct, Callable[[], None]]:
    """What to time: each product, rows times the transpose of a weight, in each implementation that can run.

    Args:
        products: Shapes, and how often the model has each.
        dtype: Type that the model computes in.
        device: 'cpu' or 'cuda'.
    """
    calls: dict[TimedProduct, Callable[[], None]] = {}
    for product in products:
        x = torch.randn(product.rows, product.inner, dtype=dtype, device=device)
        weight = torch.randn(product.columns, product.inner, dtype=dtype, device=device)
        out = torch.empty(product.rows, product.columns, dtype=dtype, device=device)
        once: dict[str, Callable[[], object]] = {_MM: partial(torch.mm, x, weight.t(), out=out)}
        if can_use_onednn(weight):
            once['onednn'] = partial(onednn_linear, x, pack_for_onednn(weight), None)
        repeats = max(1, min(_MOST_REPEATS, round(_TARGET_FLOPS[device] / product.flops)))
        for name, call in once.items():
            calls[TimedProduct(product, name, repeats)] = partial(_repeat, call, repeats)
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


@torch.inference_mode()
def _repeat(call: Callable[[], object], repeats: int) -> None:
    for _ in range(repeats):
        call()

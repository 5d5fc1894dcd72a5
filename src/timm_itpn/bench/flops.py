"""Operations of a model, and the matrix products in it, found by running it on the meta device: shapes without data."""
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['Outputs', 'Product', 'as_list', 'count_flops', 'count_products', 'training_loss']

Outputs = torch.Tensor | Sequence[torch.Tensor]  # logits, or the levels of a pyramid


class Product(NamedTuple):
    """A matrix product (rows, inner) x (inner, columns)."""
    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns


def as_list(outputs: Outputs) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


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
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            _run_on_meta(model, images, backward)
    except (NotImplementedError, RuntimeError, TypeError):  # the meta device gave no data; other faults come up again
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            _run(model, images, backward)
        model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def count_products(model: nn.Module, images: torch.Tensor) -> dict[Product, int]:
    """Matrix products of the linear and convolution layers in one forward pass, and how often each occurs."""
    with _Products() as products, sdpa_kernel(SDPBackend.MATH):
        _run_on_meta(model, images, False)
    return dict(products.found)


def _run_on_meta(model: nn.Module, images: torch.Tensor, backward: bool) -> None:
    state = [*model.named_parameters(), *model.named_buffers()]
    meta = {
        name: torch.empty_like(tensor, device='meta').requires_grad_(tensor.requires_grad and backward)
        for name, tensor in state}
    _run(lambda x: functional_call(model, meta, (x,)), torch.empty_like(images, device='meta'), backward)


def _run(model: Callable[[torch.Tensor], Outputs], images: torch.Tensor, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        outputs = model(images)
        if backward:
            training_loss(outputs, torch.zeros(len(images), dtype=torch.long, device=images.device)).backward()


class _Products(TorchDispatchMode):
    """Collects the shapes of products with a weight; those of attention are batched and do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ('mm', 'addmm'):
            a, b = args[-2:] if name == 'mm' else args[1:3]
            self.found[Product(a.shape[0], a.shape[1], b.shape[1])] += 1
        elif name == 'convolution':
            weight, groups = args[1], args[8]
            rows = out.shape[0] * out[0, 0].numel()  # images x positions
            inner = weight[0].numel()  # input channels of a group x kernel
            self.found[Product(rows, inner, weight.shape[0] // groups)] += groups
        return out

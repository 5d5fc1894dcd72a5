"""Which attention kernel ran: PyTorch chooses it per call, by device, types, sizes and what is installed."""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ['Kernels', 'record_kernels']

# a part of an operator's name -> name of the kernel; the first that fits counts
KERNELS: dict[str, str] = {
    'scaled_dot_product_cudnn_attention': 'cuDNN',
    'scaled_dot_product_efficient_attention': 'memory-efficient',
    'scaled_dot_product_flash_attention': 'flash',
    'scaled_dot_product_fused_attention_overrideable': "the device's own",
    '_safe_softmax': 'maths',  # scores of N x N
    '_softmax': 'maths',
}


class Kernels(TorchDispatchMode):
    """Notes the kernels of the attention calls that run under it, forward only.

    A softmax on its own counts as attention: the models of this field have no other in their forward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self._names: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Kernels that ran, sorted: 'cuDNN', 'flash', 'memory-efficient' or 'maths' (unfused)."""
        return sorted(self._names)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.name()
        kernel = next((kernel for part, kernel in KERNELS.items() if part in name), None)
        if kernel is not None and 'backward' not in name:
            self._names.add(kernel)
        return func(*args, **(kwargs or {}))


@contextmanager
def record_kernels() -> Iterator[Kernels]:
    """Note which attention kernels run in the block, without gradients; `kernels.names` lists them."""
    with Kernels() as kernels, torch.no_grad():
        yield kernels

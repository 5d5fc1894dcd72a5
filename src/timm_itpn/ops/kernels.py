"""Which attention kernel ran: PyTorch chooses it per call, by device, types, sizes and what is installed."""
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ['record_kernels']

# a part of an operator's name -> name of the kernel
KERNELS: dict[str, str] = {
    'scaled_dot_product_cudnn_attention': 'cuDNN',
    'scaled_dot_product_efficient_attention': 'memory-efficient',
    'scaled_dot_product_flash_attention': 'flash',
    'scaled_dot_product_fused_attention_overrideable': "the device's own",
    '_softmax': 'maths',  # scores of N x N
}


class record_kernels(TorchDispatchMode):
    """Context manager that notes which attention kernels run in the block, forward only.

    A softmax on its own counts as attention: the models of this field have no other in their forward pass.

    Attributes:
        names: Kernels that ran, sorted: 'cuDNN', 'flash', 'memory-efficient' or 'maths' (unfused).
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.name()
        kernel = next((kernel for part, kernel in KERNELS.items() if part in name), None)
        if kernel is not None and 'backward' not in name:
            self.names = sorted({*self.names, kernel})
        return func(*args, **(kwargs or {}))

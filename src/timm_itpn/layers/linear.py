"""Linear layers with a faster product, for CPUs where PyTorch's own is slow.

PyTorch gives float32 products to MKL, which does not use AVX-512 on AMD's CPUs. On one that is twice as fast with it
(EPYC, family 26), MKL took 2.0 to 2.5 times as long as oneDNN on the shapes of the models. Elsewhere models keep
PyTorch's layers.
"""
import functools
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import flop_registry, register_flop_formula

from ..ops.attention import is_transformed
from ..ops.linear import can_use_onednn, onednn_linear

MIN_MULTIPLY_ADDS = 2 ** 22  # of a product; below it, calling oneDNN takes longer than MKL takes
TORCH_FORWARD = nn.Linear.forward


class OneDnnProduct(torch.autograd.Function):
    """`onednn_linear` for x (M, C), weight (D, C) and bias (D,), with derivatives of every order, in reverse mode."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        multiply = F.linear if is_transformed() else OneDnnProduct.apply  # gradients may come in batches
        return (
            multiply(grad, weight.t(), None) if wanted[0] else None,
            multiply(grad.t(), x.t(), None) if wanted[1] else None,
            grad.sum(0) if wanted[2] else None,
        )


def _count_flops(x_shape: torch.Size, weight_shape: torch.Size, *args: Any, out_shape: torch.Size, **_: Any) -> int:
    return 2 * out_shape.numel() * x_shape[-1]


_OPERATOR = getattr(torch.ops.mkldnn, '_linear_pointwise', None)  # not in every build of PyTorch
if _OPERATOR is not None and _OPERATOR not in flop_registry:
    register_flop_formula(_OPERATOR)(_count_flops)  # or `FlopCounterMode` would not see these products


class OneDnnLinear(nn.Linear):
    """`nn.Linear` whose float32 product on the CPU is oneDNN's; under transforms of `torch.func` it is PyTorch's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if self._is_for_onednn(x):
                multiply = OneDnnProduct.apply if torch.is_grad_enabled() else onednn_linear  # .apply() takes 20 us
                y = multiply(x.reshape(-1, x.shape[-1]), self.weight, self.bias)  # (..., C) -> (M, C) -> (M, D)
                return y.reshape(*x.shape[:-1], y.shape[-1])
            return nn.Linear.forward(self, x)  # perhaps somebody has put another in its place
        return F.linear(x, self.weight, self.bias)

    @torch.jit.unused
    def _is_for_onednn(self, x: torch.Tensor) -> bool:
        weight = self.weight
        return (
            type(x) is torch.Tensor and type(weight) in (nn.Parameter, torch.Tensor)  # not traced, quantised, sharded
            and x.is_cpu and x.dtype == weight.dtype == torch.float32
            and x.shape[-1:] == weight.shape[1:]  # if not, PyTorch's error says so
            and x.numel() * len(weight) >= MIN_MULTIPLY_ADDS
            and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
            and not is_transformed() and not torch.is_autocast_enabled('cpu')
            and nn.Linear.forward is TORCH_FORWARD
            and can_use_onednn(weight)
        )


@functools.cache
def is_onednn_faster() -> bool:
    """Whether this CPU is of AMD and has AVX-512, which MKL does not use there."""
    if not hasattr(torch.cpu, 'get_capabilities'):  # an older PyTorch does not tell
        return False
    cpu = torch.cpu.get_capabilities()
    is_amd = cpu.get('cpu_name', '').startswith('AMD')
    return torch.backends.mkl.is_available() and is_amd and cpu.get('avx512_f', False)


def use_onednn(model: nn.Module) -> None:
    """Replace the Linear layers of a model by those with oneDNN's product, if this CPU gains by it."""
    if not is_onednn_faster():
        return
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                twin: nn.Module = nn.Module.__new__(OneDnnLinear)
                twin.__dict__.update(layer.__dict__)  # the same parameters, under the same names
                setattr(module, name, twin)

"""Matrix product of oneDNN on the CPU with gradients, which are products too.

PyTorch gives float32 products to MKL, which does not use AVX-512 on AMD's CPUs. On one that is twice as fast with it
(EPYC, family 26), MKL took 2.0 to 2.5 times as long as oneDNN on the shapes of the models. On other CPUs PyTorch's own
choice is left alone.
"""
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import onednn, reference

SMALL = 2 ** 22  # multiply-adds of a product; below it, calling oneDNN takes longer than MKL takes

Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class Product(torch.autograd.Function):
    """x @ weight.T + bias for x (M, C), weight (D, C) and bias (D,) or None. (M, D)."""

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            Product.apply(grad, weight.t(), None) if wanted[0] else None,
            Product.apply(grad.t(), x.t(), None) if wanted[1] else None,
            grad.sum(0) if wanted[2] else None,
        )

    @staticmethod
    def jvp(ctx: Any, dx: torch.Tensor, dweight: torch.Tensor, dbias: torch.Tensor | None) -> torch.Tensor:
        x, weight = ctx.saved_tensors
        return Product.apply(dx, weight, dbias) + Product.apply(x, dweight, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: torch.Tensor) -> tuple[torch.Tensor, int]:
        return torch.func.vmap(F.linear, in_dims)(*inputs), 0


def count_flops(x_shape: torch.Size, weight_shape: torch.Size, *args: Any, out_shape: torch.Size, **kwargs: Any) -> int:
    return 2 * out_shape.numel() * x_shape[-1]


OPERATOR = getattr(torch.ops.mkldnn, '_linear_pointwise', None)  # not in every build of PyTorch
if OPERATOR is not None and OPERATOR not in flop_registry:
    register_flop_formula(OPERATOR)(count_flops)  # or `FlopCounterMode` would not see these products


def why_not(weight: torch.Tensor) -> str | None:
    if weight.device.type == 'cpu' and weight.dtype != torch.float32:
        return f'it is for float32, and the weight is {weight.dtype}'
    return onednn.why_not(weight) or why_not_here()


@functools.lru_cache(None)
def why_not_here() -> str | None:
    """Reason why PyTorch's own choice is as good on this CPU."""
    if not hasattr(torch.cpu, 'get_capabilities'):
        return 'this version of PyTorch does not know the name of the CPU'
    cpu = torch.cpu.get_capabilities()
    if torch.backends.mkl.is_available() and cpu.get('cpu_name', '').startswith('AMD') and cpu.get('avx512_f'):
        return None
    return 'it is for CPUs of AMD with AVX-512, which MKL does not use there'


def pack(weight: torch.Tensor) -> torch.Tensor:
    return weight


def forward(
        x: torch.Tensor,
        packed: torch.Tensor,
        bias: torch.Tensor | None,
        act: str = 'none',
        residual: torch.Tensor | None = None,
) -> torch.Tensor:
    fits = x.dtype == packed.dtype and x.shape[-1] == packed.shape[1]  # if not, PyTorch's error says why
    if not fits or x.numel() * len(packed) < SMALL:
        return reference.forward(x, packed, bias, act, residual)
    with_gradients = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
    product = Product.apply if with_gradients else Product.forward  # apply() alone takes 20 us
    y = product(x.reshape(-1, x.shape[-1]), packed, bias)  # (..., C) -> (M, C) -> (M, D)
    return reference.finish(y.reshape(*x.shape[:-1], len(packed)), act, residual)

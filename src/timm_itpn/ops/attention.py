"""Scaled dot-product attention: PyTorch's fused kernels, and the maths as written in the papers.

    q: (B, num_heads, N, head_dim); k, v: (B, num_heads, M, head_dim), one floating dtype.
    bias: None, or what broadcasts to the scores (B, num_heads, N, M) and is added to them.
    scale: factor on the scores, None for head_dim ** -0.5.

PyTorch chooses its kernel per call, by device, types, sizes and what is installed; `record_kernels` tells which ran.
"""
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, use_fused_attn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

IMPLEMENTATIONS = ('sdpa', 'reference')
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v
MANY_TOKENS = 2048

# a part of an operator's name -> name of the kernel
KERNELS: dict[str, str] = {
    'scaled_dot_product_cudnn_attention': 'cuDNN',
    'scaled_dot_product_efficient_attention': 'memory-efficient',
    'scaled_dot_product_flash_attention': 'flash',
    'scaled_dot_product_fused_attention_overrideable': "the device's own",
    '_softmax': 'maths',  # scores of N x N
}


def choose_attention(name: str = 'auto') -> str:
    """Return one of `IMPLEMENTATIONS`: the one that is asked for, or for 'auto' the first that can run.

    Raises:
        ValueError: `name` is unknown.
        RuntimeError: The implementation asked for cannot run; the message gives the reason.
    """
    if name == 'auto':
        return 'sdpa' if use_fused_attn() else 'reference'
    if name not in IMPLEMENTATIONS:
        raise ValueError(f'attn_impl {name!r} is unknown, use one of: auto, {", ".join(IMPLEMENTATIONS)}')
    if name == 'sdpa' and not use_fused_attn():
        raise RuntimeError(
            "attn_impl 'sdpa' cannot run: timm has fused attention off (TIMM_FUSED_ATTN=0, or exportable=True)")
    return name


def as_bias(bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A bias as it is; of a mask of bool, True where a query sees a key, one of `dtype` with 0 and -inf."""
    if bias is not None and bias.dtype == torch.bool:
        return torch.zeros_like(bias, dtype=dtype).masked_fill(~bias, float('-inf'))
    return bias


def is_transformed() -> bool:
    """True in eager transforms of `torch.func` and forward-mode differentiation: tensors may be stand-ins."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


@torch.fx.wrap  # a leaf for FX: a tracer has no sizes to compare
@register_notrace_function
def _contiguous_heads(x: torch.Tensor) -> torch.Tensor:
    """Keys or values (B, num_heads, N, head_dim), on the CPU with the rows of a head next to each other if N is large.

    The kernel reads them once for each block of queries, so a copy soon pays.
    """
    if not torch.jit.is_scripting():
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing() and x.is_cpu and x.shape[-2] >= MANY_TOKENS:
            return x.contiguous()
    return x


def fused_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None = None,
        dropout_p: float = 0.,
        scale: float | None = None,
) -> torch.Tensor:
    """Attention in one kernel, without an (N, M) tensor; (B, num_heads, N, head_dim).

    PyTorch itself falls back to plain maths for attention dropout and for a bias that needs a gradient, on the CPU.
    Under transforms of `torch.func` it cannot see that the bias needs one, and its kernels have neither forward-mode
    nor second derivatives: there it is plain maths, which has them all.
    """
    if not torch.jit.is_scripting():
        if is_transformed():
            return F.dropout(attention_weights(q, k, bias, scale).type_as(v), dropout_p) @ v
    k, v = _contiguous_heads(k), _contiguous_heads(v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)


def attention_weights(
        q: torch.Tensor,
        k: torch.Tensor,
        bias: torch.Tensor | None = None,
        scale: float | None = None,
) -> torch.Tensor:
    """Softmax of the scores, (B, num_heads, N, M); the yardstick for the fused kernels.

    Scores and softmax run in float32 when the inputs are shorter, as in the official models; float64 stays float64.
    """
    # float32 factors of one element, not .float(): they lengthen half precision, leave float64, and FX can trace them
    q = q * q.new_full((1,), q.shape[-1] ** -0.5 if scale is None else scale, dtype=torch.float32)
    k = k * k.new_full((1,), 1., dtype=torch.float32)  # coremltools has no new_ones
    scores = q @ k.transpose(-2, -1)  # (B, num_heads, N, M)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1)


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

"""Matrix product of oneDNN on the CPU, through the operators that PyTorch's own compiler emits when it freezes a model.

The weight is kept in the blocked layout of the kernel, and the activation or the sum is done on each tile of the
output while it is in the cache.
"""
import torch

EPILOGUES = {'none': ('none', ''), 'gelu': ('gelu', 'none'), 'silu': ('swish', '')}  # act -> oneDNN's name, algorithm


def why_not(weight: torch.Tensor) -> str | None:
    if weight.device.type != 'cpu':
        return f'it is for the CPU, and the weight is on {weight.device.type}'
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, '_linear_pointwise'):
        return 'this build of PyTorch has no oneDNN'
    if not torch.backends.mkldnn.enabled:
        return 'oneDNN is off (torch.backends.mkldnn.enabled)'
    if weight.dtype == torch.float32:
        return None
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if weight.dtype in supported and supported[weight.dtype]():
        return None
    return f'it cannot multiply {weight.dtype} on this CPU'


def pack(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


def forward(
        x: torch.Tensor,
        packed: torch.Tensor,
        bias: torch.Tensor | None,
        act: str = 'none',
        residual: torch.Tensor | None = None,
) -> torch.Tensor:
    if residual is not None and act == 'none':
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed, bias, 'add')
    name, algorithm = EPILOGUES[act]
    x = torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], algorithm)
    return x if residual is None else residual + x

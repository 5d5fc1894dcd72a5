"""A Linear layer with what follows it, for inference: residual + act(x @ weight.T + bias).

    x: (..., in_features); weight: (out_features, in_features); one floating dtype.
    bias: (out_features,), or None.
    act: one of `ACTIVATIONS`.
    residual: None, or of the shape of the output.

`onednn_linear` is the matrix product of oneDNN on the CPU, through the operators that PyTorch's own compiler emits when
it freezes a model. The weight is kept in the blocked layout of the kernel, and the activation or the sum is done on
each tile of the output while it is in the cache.
"""
import torch
import torch.nn.functional as F

ACTIVATIONS = {'none': ('none', ''), 'gelu': ('gelu', 'none'), 'silu': ('swish', '')}  # act -> oneDNN's name, algorithm


def plain_linear(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        act: str = 'none',
        residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The layers one after the other, as PyTorch has them; on any device, and what compilers and exporters see."""
    x = F.linear(x, weight, bias)
    if act == 'gelu':
        x = F.gelu(x)
    elif act == 'silu':
        x = F.silu(x)
    return x if residual is None else residual + x


def can_use_onednn(weight: torch.Tensor) -> bool:
    """Whether oneDNN can multiply with a weight: its device and type, the CPU and the build of PyTorch decide."""
    backend, operators = torch.backends.mkldnn, torch.ops.mkldnn
    if weight.device.type != 'cpu' or not backend.is_available() or not backend.enabled:
        return False
    if not hasattr(operators, '_linear_pointwise'):  # not in every build
        return False
    if weight.dtype == torch.bfloat16:
        return operators._is_mkldnn_bf16_supported()
    if weight.dtype == torch.float16:
        return operators._is_mkldnn_fp16_supported()
    return weight.dtype == torch.float32


def pack_for_onednn(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


def onednn_linear(
        x: torch.Tensor,
        packed: torch.Tensor,
        bias: torch.Tensor | None,
        act: str = 'none',
        residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `plain_linear`, without derivatives; `packed` is from `pack_for_onednn`, or a weight as it is."""
    if residual is not None and act == 'none':
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed, bias, 'add')
    name, algorithm = ACTIVATIONS[act]
    x = torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], algorithm)
    return x if residual is None else residual + x

"""Relative position bias of stage 3: one learned number per head and offset between two tokens.

Differs from `timm.layers.RelPosBias`: no index is kept. timm's module holds one of N x N int64 per block, which for
24 blocks at 1024 pixels is 3.2 GB; here the bias is copied out of overlapping views of the table.
"""
from typing import Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module, resize_rel_pos_bias_table

__all__ = ['RelPosBias']

ALIGNMENT = 8  # rows of a bias start at multiples of so many elements, or CUDA's memory-efficient kernel copies it
MAX_CACHED = 2 ** 23  # elements of a bias that is kept; 512 pixels with 8 heads. At 1024, 24 of them would be 13 GB.


def _resample(table: torch.Tensor, height: int, width: int, old_height: int, old_width: int) -> torch.Tensor:
    """Resample a table to another grid by timm's helper: offsets near zero keep their meaning, far ones are stretched.

    Args:
        table: ((2 * old_height - 1) * (2 * old_width - 1), num_heads), row-major.
        height: Of the new grid, in tokens; and so on.

    Returns:
        The table of the new grid, a copy also when nothing changes.
    """
    shape = ((2 * height - 1) * (2 * width - 1), table.shape[1])
    return resize_rel_pos_bias_table(table, (height, width), shape, old_window_size=(old_height, old_width)).clone()


def _resample_fake(table: torch.Tensor, height: int, width: int, old_height: int, old_width: int) -> torch.Tensor:
    return table.new_empty((2 * height - 1) * (2 * width - 1), table.shape[1])


def _save_sizes(ctx, inputs, output) -> None:
    table, *ctx.sizes = inputs
    ctx.like = table.new_empty(1).expand(table.shape)  # shape, type and device only


def _resample_backward(ctx, grad: torch.Tensor):
    table = torch.zeros_like(ctx.like, memory_format=torch.contiguous_format).requires_grad_()
    with torch.enable_grad():  # resampling is linear: its gradient is the same at any table
        resampled = _resample(table, *ctx.sizes)
    return torch.autograd.grad(resampled, table, grad)[0], None, None, None, None


# an operator, so that compilers and exporters need not look inside, and sizes may stay symbols
_op = torch.library.custom_op('timm_itpn::resample_rel_pos_table', _resample, mutates_args=())
_op.register_fake(_resample_fake)
_op.register_autograd(_resample_backward, setup_context=_save_sizes)


@register_notrace_module
class RelPosBias(nn.Module):
    """Bias for the attention scores of one block; it is added for query i, key j by their offset on the grid.

    Offset (dy, dx) = query - key; its row in the table is (dy + h - 1) * (2w - 1) + dx + w - 1.

    In evaluation without gradients the bias is kept until the table changes (bounded by `MAX_CACHED`). Only changes
    through `.data` of a table, in evaluation, go unnoticed.

    Args:
        window_size: Grid (h, w), in tokens.
        num_heads: Attention heads.
        dynamic_window_size: Resample the table in forward when the map has another size.
    """
    dynamic_window_size: torch.jit.Final[bool]
    __jit_ignored_attributes__ = ['_cache']

    def __init__(
            self,
            window_size: Tuple[int, int],
            num_heads: int,
            dynamic_window_size: bool = False,
            device=None,
            dtype=None,
    ):
        super().__init__()
        self.window_size = window_size
        self.dynamic_window_size = dynamic_window_size
        num_offsets = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
        self.relative_position_bias_table = nn.Parameter(
            torch.empty(num_offsets, num_heads, device=device, dtype=dtype))
        self._cache: Optional[Tuple] = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.relative_position_bias_table)

    def set_window_size(self, window_size: Tuple[int, int]) -> None:
        """Resample the table to a grid (height, width)."""
        if window_size == self.window_size:
            return
        table = self.relative_position_bias_table
        with torch.no_grad():
            resampled = torch.ops.timm_itpn.resample_rel_pos_table(table, *window_size, *self.window_size)
        self.relative_position_bias_table = nn.Parameter(resampled, requires_grad=table.requires_grad)
        self.window_size = window_size
        self._cache = None

    def extra_repr(self) -> str:
        return f'window_size={self.window_size}'

    def forward(self, height: int, width: int) -> torch.Tensor:
        """Return the bias (1, num_heads, N, N), N = height * width; rows are aligned in memory."""
        if not torch.jit.is_scripting():
            if self._may_cache():
                return self._cached(height, width)
        return self._compute(height, width)

    def _compute(self, height: int, width: int) -> torch.Tensor:
        H, W = self.window_size
        table = self.relative_position_bias_table
        if self.dynamic_window_size:
            table = torch.ops.timm_itpn.resample_rel_pos_table(table, height, width, H, W)
            H, W = height, width
        # overlapping views instead of an index: offsets = rows of both grids, read from the last to the first
        table = table.reshape(2 * H - 1, 2 * W - 1, -1).permute(2, 0, 1).flip(1, 2)  # (num_heads, 2H-1, 2W-1)
        bias = table.unfold(1, H, 1).unfold(2, W, 1)  # (num_heads, H, W, H, W): queries from the last, then keys
        bias = bias.flip(1, 2).reshape(1, -1, H * W, H * W)
        return F.pad(bias, (0, -(H * W) % ALIGNMENT))[..., :H * W]

    def _may_cache(self) -> bool:
        table = self.relative_position_bias_table
        return not (
            self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or type(table) is not nn.Parameter  # a tracer's or functorch's stand-in
            or table.is_inference()  # has no version
        )

    def _cached(self, height: int, width: int) -> torch.Tensor:
        table = self.relative_position_bias_table
        key = (table._version, table.dtype, table.device, height, width)
        cache = self._cache
        if cache is not None and cache[0] is table and cache[1] == key:
            return cache[2]
        bias = self._compute(height, width)
        if bias.numel() <= MAX_CACHED:
            self._cache = (table, key, bias)
        return bias

    def train(self, mode: bool = True) -> nn.Module:
        self._cache = None
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        self._cache = None
        return super()._apply(fn, recurse)

    def __getstate__(self):
        return {**self.__dict__, '_cache': None}

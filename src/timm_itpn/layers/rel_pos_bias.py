"""Relative position bias of stage 3: one learned number per head and offset between two tokens.

Differs from `timm.layers.RelPosBias`: the index is not kept but made anew when it is needed. One of N x N int64 per
block, as timm's module has it, would be 3.2 GB for 24 blocks at 1024 pixels.
"""
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module

__all__ = ['RelPosBias', 'resample_table']

MAX_CACHED = 2 ** 23  # elements of a bias that is kept; 512 pixels with 8 heads. At 1024, 24 of them would be 13 GB.


def resample_table(table: torch.Tensor, new_size: tuple[int, int], old_size: tuple[int, int]) -> torch.Tensor:
    """Resample a table to another grid: offsets near zero keep their meaning, far ones are stretched.

    As `timm.layers.resize_rel_pos_bias_table` without SciPy, to float error; that one goes by way of the CPU, head by
    head, so CUDA would wait for it in every block of a model with dynamic image size.

    Args:
        table: ((2h-1) * (2w-1), num_heads), row-major.
        new_size: New grid (height, width), in tokens.
        old_size: Grid (h, w) of `table`.
    """
    if tuple(new_size) == tuple(old_size):
        return table
    values = table.reshape(2 * old_size[0] - 1, 2 * old_size[1] - 1, -1).float()
    for dim in (0, 1):
        left, right, weight = _neighbours(old_size[dim], new_size[dim], dim, table.device)
        values = torch.lerp(values.index_select(dim, left), values.index_select(dim, right), weight)
    return values.flatten(0, 1).to(table.dtype)  # (2H-1, 2W-1, num_heads) -> ((2H-1) * (2W-1), num_heads)


def _neighbours(old: int, new: int, dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each new offset along axis `dim`: the old ones left and right of it, and the weight of the right one.

    Old offset i stands at 1 + q + ... + q ** (i - 1), so that the last is at the end of the new ones. Nothing is copied
    from host to device, which would have to wait.
    """
    targets = torch.arange(1 - new, new, device=device, dtype=torch.float32)
    if old == 1:
        left = right = torch.zeros_like(targets, dtype=torch.int64)
        weight = torch.zeros_like(targets)
    else:
        q = _stretch(old - 1, new - 1)
        steps = torch.arange(1 - old, old, device=device, dtype=torch.float32)
        places = steps.sign() * torch.expm1(steps.abs() * math.log(q)) / (q - 1)
        left = (torch.searchsorted(places, targets) - 1).clamp(0, 2 * old - 3)
        right = left + 1
        start, end = places.index_select(0, left), places.index_select(0, right)
        weight = ((targets - start) / (end - start)).clamp(0, 1)
    return left, right, weight.reshape(-1, 1, 1) if dim == 0 else weight.reshape(-1, 1)


@functools.cache
def _stretch(old: int, new: int) -> float:
    """Ratio q, between 1.01 and 1.5, for which 1 + q + ... + q ** (old - 1) is `new`; found as timm does."""
    left, right = 1.01, 1.5
    while right - left > 1e-6:
        q = (left + right) / 2
        if (1 - q ** old) / (1 - q) > new:
            right = q
        else:
            left = q
    return q


def bias_of_table(table: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Spread a table over all pairs of tokens.

    Args:
        table: ((2 * height - 1) * (2 * width - 1), num_heads).
        height: Of the grid, in tokens.
        width: Of the grid, in tokens.

    Returns:
        The bias (1, num_heads, N, N + padding), N = height * width; rows are padded to multiples of 8, or CUDA's
        memory-efficient attention would copy it to align them.
    """
    index = _offsets(height, width, table.device)
    bias = table.t().contiguous().index_select(1, index.flatten())
    return bias.reshape(1, -1, height * width, index.shape[1])


def _offsets(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Rows of the table for all pairs of tokens, (N, N + padding), int32."""
    y = torch.arange(height, device=device, dtype=torch.int32)
    x = torch.arange(width, device=device, dtype=torch.int32)
    rows = (y[:, None] - y + height - 1) * (2 * width - 1)  # (height, height): query, key
    columns = x[:, None] - x + width - 1  # (width, width)
    index = (rows[:, None, :, None] + columns[:, None, :]).reshape(height * width, height * width)
    return F.pad(index, (0, -(height * width) % 8))


def _resampled_bias(table: torch.Tensor, height: int, width: int, old_height: int, old_width: int) -> torch.Tensor:
    """Bias of a table that is resampled from the old grid. Both steps are linear in the table."""
    return bias_of_table(resample_table(table, (height, width), (old_height, old_width)), height, width)


def _resampled_bias_fake(table: torch.Tensor, height: int, width: int, old_height: int, old_width: int) -> torch.Tensor:
    N = height * width
    return table.new_empty(1, table.shape[1], N, N + -N % 8)


def _table_gradient(grad: torch.Tensor, height: int, width: int, old_height: int, old_width: int) -> torch.Tensor:
    """Gradient of the table, from that of the bias: what each step has spread is summed."""
    index = _offsets(height, width, grad.device).flatten()
    dtype = torch.promote_types(grad.dtype, torch.float32)  # each entry sums up to N gradients
    values = grad.new_zeros(grad.shape[1], (2 * height - 1) * (2 * width - 1), dtype=dtype)
    values.index_add_(1, index, grad.reshape(grad.shape[1], -1).to(dtype))
    values = _resampling_gradient(values.t().contiguous(), height, width, old_height, old_width)
    return values.to(grad.dtype)


def _table_gradient_fake(grad: torch.Tensor, height: int, width: int, old_height: int, old_width: int) -> torch.Tensor:
    return grad.new_empty((2 * old_height - 1) * (2 * old_width - 1), grad.shape[1])


def _resampled(table: torch.Tensor, height: int, width: int, old_height: int, old_width: int) -> torch.Tensor:
    return resample_table(table, (height, width), (old_height, old_width)).clone()  # an operator's output is no input


def _resampled_fake(table: torch.Tensor, height: int, width: int, old_height: int, old_width: int) -> torch.Tensor:
    return table.new_empty((2 * height - 1) * (2 * width - 1), table.shape[1])


def _resampling_gradient(grad: torch.Tensor, height: int, width: int, old_height: int, old_width: int) -> torch.Tensor:
    """Gradient of a table, from that of the resampled one."""
    if (height, width) == (old_height, old_width):
        return grad.clone()
    values = grad.to(torch.promote_types(grad.dtype, torch.float32)).reshape(2 * height - 1, 2 * width - 1, -1)
    for dim, (old, new) in enumerate(((old_height, height), (old_width, width))):
        left, right, weight = _neighbours(old, new, dim, grad.device)
        shape = list(values.shape)
        shape[dim] = 2 * old - 1
        summed = values.new_zeros(shape).index_add_(dim, left, values * (1 - weight))
        values = summed.index_add_(dim, right, values * weight)
    return values.flatten(0, 1).to(grad.dtype)


def _save_sizes(ctx, inputs, output) -> None:
    _, *ctx.sizes = inputs


def _resampled_bias_backward(ctx, grad: torch.Tensor):
    return torch.ops.timm_itpn.resampled_rel_pos_bias_backward(grad, *ctx.sizes), None, None, None, None


def _resampled_backward(ctx, grad: torch.Tensor):
    return torch.ops.timm_itpn.resampled_rel_pos_table_backward(grad, *ctx.sizes), None, None, None, None


# for sizes that are known in forward only: operators, which compilers and exporters need not look into
_op = torch.library.custom_op('timm_itpn::resampled_rel_pos_bias', _resampled_bias, mutates_args=())
_op.register_fake(_resampled_bias_fake)
_op.register_autograd(_resampled_bias_backward, setup_context=_save_sizes)
_gradient_op = torch.library.custom_op(
    'timm_itpn::resampled_rel_pos_bias_backward', _table_gradient, mutates_args=())
_gradient_op.register_fake(_table_gradient_fake)
_table_op = torch.library.custom_op('timm_itpn::resampled_rel_pos_table', _resampled, mutates_args=())
_table_op.register_fake(_resampled_fake)
_table_op.register_autograd(_resampled_backward, setup_context=_save_sizes)
_table_gradient_op = torch.library.custom_op(
    'timm_itpn::resampled_rel_pos_table_backward', _resampling_gradient, mutates_args=())
_table_gradient_op.register_fake(_table_gradient_fake)


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
        spread: True = forward gives the bias of all pairs of tokens, False = the table of offsets.
    """
    dynamic_window_size: torch.jit.Final[bool]
    spread: torch.jit.Final[bool]
    __jit_ignored_attributes__ = ['_cache']

    def __init__(
            self,
            window_size: tuple[int, int],
            num_heads: int,
            dynamic_window_size: bool = False,
            spread: bool = True,
            device=None,
            dtype=None,
    ):
        super().__init__()
        self.window_size = window_size
        self.dynamic_window_size = dynamic_window_size
        self.spread = spread
        num_offsets = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
        self.relative_position_bias_table = nn.Parameter(
            torch.empty(num_offsets, num_heads, device=device, dtype=dtype))
        self._cache: tuple | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.relative_position_bias_table)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Resample the table to a grid (height, width)."""
        if window_size == self.window_size:
            return
        table = self.relative_position_bias_table
        with torch.no_grad():
            resampled = resample_table(table, window_size, self.window_size)
        self.relative_position_bias_table = nn.Parameter(resampled, requires_grad=table.requires_grad)
        self.window_size = window_size
        self._cache = None

    def extra_repr(self) -> str:
        return f'window_size={self.window_size}'

    def forward(self, height: int, width: int) -> torch.Tensor:
        """Return the bias (1, num_heads, N, N), N = height * width; rows are aligned in memory.

        Without `spread` it is the table, (2 * height - 1, 2 * width - 1, num_heads).
        """
        if not self.spread:
            table = resample_table(self.relative_position_bias_table, (height, width), self.window_size)
            return table.reshape(2 * height - 1, 2 * width - 1, -1)
        if not torch.jit.is_scripting():
            if self._may_cache():
                return self._cached(height, width)
        return self._compute(height, width)

    def between(self, queries: torch.Tensor, keys: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Return the bias between some tokens of a height x width grid only.

        Args:
            queries: Their places on the grid (..., Q), row-major; height * width for a token without place.
            keys: Likewise, (..., K).
            height: Of the grid, in tokens.
            width: Of the grid, in tokens.

        Returns:
            (..., num_heads, Q, K), 0 for tokens without place.
        """
        table = self.relative_position_bias_table
        if self.dynamic_window_size:
            H, W = self.window_size
            table = torch.ops.timm_itpn.resampled_rel_pos_table(table, height, width, H, W)
        num_offsets = table.shape[0]
        y, x = queries[..., :, None] // width, queries[..., :, None] % width
        rows = (y - keys[..., None, :] // width + height - 1) * (2 * width - 1)  # (..., Q, K)
        index = rows + x - keys[..., None, :] % width + width - 1
        nowhere = (queries[..., :, None] == height * width) | (keys[..., None, :] == height * width)
        index = index.masked_fill(nowhere, num_offsets)
        values = F.pad(table, (0, 0, 0, 1)).t().contiguous()  # (num_heads, num_offsets + 1), 0 at the end
        bias = values.index_select(1, index.flatten()).reshape([-1] + list(index.shape))
        return bias.movedim(0, -3)

    def _compute(self, height: int, width: int) -> torch.Tensor:
        table = self.relative_position_bias_table
        H, W = self.window_size
        if self.dynamic_window_size:
            bias = torch.ops.timm_itpn.resampled_rel_pos_bias(table, height, width, H, W)
            return bias[..., :height * width]
        return bias_of_table(table, H, W)[..., :H * W]

    def _may_cache(self) -> bool:
        table = self.relative_position_bias_table
        return not (
            self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or table.is_cuda and torch.cuda.is_current_stream_capturing()  # its graph would outlive what is kept
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

    def __setattr__(self, name: str, value) -> None:
        if name == 'relative_position_bias_table':  # FSDP2 gathers new values into the old table, unseen, and sets it
            self._cache = None
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> nn.Module:
        self._cache = None
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        self._cache = None
        return super()._apply(fn, recurse)

    def __getstate__(self):
        return {**self.__dict__, '_cache': None}

"""Relative position bias of stage 3: one learned number per head and offset between two tokens.

Differs from `timm.layers.RelPosBias`: the index is not kept but made anew when it is needed. One of N x N int64 per
block, as timm's module has it, would be 3.2 GB for 24 blocks at 1024 pixels.
"""
import functools
import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import is_exporting, register_notrace_module
from torch.types import Device

from ..ops.attention import is_transformed
from .tracing import same_grid

Neighbours = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # left, right, and the weight of the right one

MAX_SIDE = 128  # tokens, of graphs that take any size; 2048 pixels
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
    if new_size == old_size:
        return table
    rows = _neighbours(old_size[0], new_size[0], 0, table.device)
    columns = _neighbours(old_size[1], new_size[1], 1, table.device)
    return _interpolated(table, old_size, [rows, columns])


def _interpolated(table: torch.Tensor, old_size: tuple[int, int], neighbours: list[Neighbours]) -> torch.Tensor:
    values = table.to(torch.promote_types(table.dtype, torch.float32))
    values = values.reshape(2 * old_size[0] - 1, 2 * old_size[1] - 1, -1)
    for dim, (left, right, weight) in enumerate(neighbours):
        values = torch.lerp(values.index_select(dim, left), values.index_select(dim, right), weight.type_as(values))
    return values.flatten(0, 1).to(table.dtype)  # (2H-1, 2W-1, num_heads) -> ((2H-1) * (2W-1), num_heads)


def resample_table_in_graph(
        table: torch.Tensor, height: int, width: int, old_size: tuple[int, int]) -> torch.Tensor:
    """As `resample_table`, in operators that every exporter knows, for a grid whose sizes only the graph knows.

    Runtimes fail at a side of more than `MAX_SIDE` tokens.
    """
    offsets = [torch.arange(1 - new, new, device=table.device) for new in (height, width)]
    same = (offsets[0][-1:] == old_size[0] - 1) & (offsets[1][-1:] == old_size[1] - 1)
    neighbours = []
    for dim, (old, targets) in enumerate(zip(old_size, offsets)):
        steps = torch.arange(1 - old, old, device=table.device, dtype=torch.float32)
        of_all = torch.tensor(_positions(old), device=table.device)  # a constant of the graph
        positions = torch.where(same, steps, of_all.index_select(0, targets[-1:])[0])
        neighbours.append(_weighted(positions, targets.float(), dim))
    return _interpolated(table, old_size, neighbours)


def _neighbours(old: int, new: int, dim: int, device: torch.device) -> Neighbours:
    """For each new offset along axis `dim`: the old ones left and right of it, and the weight of the right one.

    Old offset i stands at 1 + q + ... + q ** (i - 1), so that the last is at the end of the new ones. Nothing is copied
    from host to device, which would have to wait.
    """
    targets = torch.arange(1 - new, new, device=device, dtype=torch.float32)
    q = _stretch(old - 1, new - 1) if torch.jit.is_scripting() else _kept_stretch(old - 1, new - 1)
    steps = torch.arange(1 - old, old, device=device, dtype=torch.float32)
    positions = steps.sign() * torch.expm1(steps.abs() * math.log(q)) / (q - 1)
    return _weighted(positions, targets, dim)


@functools.cache
def _positions(old: int) -> list[list[float]]:
    """Where the old offsets stand along an axis, for each new side from 1 to `MAX_SIDE`; ONNX has no expm1."""
    return [
        [math.copysign(math.expm1(abs(step) * math.log(q)) / (q - 1), step) for step in range(1 - old, old)]
        for q in (_stretch(old - 1, new) for new in range(MAX_SIDE))]


def _weighted(positions: torch.Tensor, targets: torch.Tensor, dim: int) -> Neighbours:
    last = positions.shape[0] - 1
    left = ((positions < targets[:, None]).sum(dim=1) - 1).clamp(0, max(0, last - 1))
    right = (left + 1).clamp(max=last)
    start, end = positions.index_select(0, left), positions.index_select(0, right)
    weight = ((targets - start) / (end - start)).clamp(0, 1) if last else torch.zeros_like(start)
    return left, right, weight.reshape(-1, 1, 1) if dim == 0 else weight.reshape(-1, 1)


def _stretch(old: int, new: int) -> float:
    """Ratio q, between 1.01 and 1.5, for which 1 + q + ... + q ** (old - 1) is `new`; found as timm does."""
    left = q = 1.01
    right = 1.5
    while right - left > 1e-6:
        q = (left + right) / 2
        if (1 - q ** old) / (1 - q) > new:
            right = q
        else:
            left = q
    return q


_kept_stretch = functools.cache(_stretch)


def _resampled(table: torch.Tensor, height: int, width: int, old_height: int, old_width: int) -> torch.Tensor:
    return resample_table(table, (height, width), (old_height, old_width)).clone()  # not the input itself


def _gradient(grad: torch.Tensor, height: int, width: int, old_height: int, old_width: int) -> torch.Tensor:
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


def _save_sizes(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, *ctx.sizes = inputs


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return torch.ops.timm_itpn.resampled_rel_pos_table_backward(grad, *ctx.sizes), None, None, None, None


# for compilers, where sizes are known in forward only: operators that they need not look into
_table_op = torch.library.custom_op('timm_itpn::resampled_rel_pos_table', _resampled, mutates_args=())
_table_op.register_fake(
    lambda table, height, width, *_: table.new_empty((2 * height - 1) * (2 * width - 1), table.shape[1]))
_table_op.register_autograd(_backward, setup_context=_save_sizes)
_gradient_op = torch.library.custom_op('timm_itpn::resampled_rel_pos_table_backward', _gradient, mutates_args=())
_gradient_op.register_fake(
    lambda grad, _h, _w, height, width: grad.new_empty((2 * height - 1) * (2 * width - 1), grad.shape[1]))


@register_notrace_module
class RelPosBias(nn.Module):
    """Bias for the attention scores of one block; it is added for query i, key j by their offset on the grid.

    Offset (dy, dx) = query - key; its row in the table is (dy + h - 1) * (2w - 1) + dx + w - 1.

    In evaluation without gradients on the CPU the bias is kept, with the table that it was made of (bounded by
    `MAX_CACHED`). On other devices comparing the tables would have to wait, and making the bias costs little.

    Args:
        window_size: Grid (h, w), in tokens.
        num_heads: Attention heads.
        dynamic_window_size: Resample the table in forward when the map has another size.
    """
    dynamic_window_size: torch.jit.Final[bool]
    __jit_ignored_attributes__ = ['_cache']

    def __init__(
            self,
            window_size: tuple[int, int],
            num_heads: int,
            dynamic_window_size: bool = False,
            device: Device = None,
            dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.window_size = window_size
        self.dynamic_window_size = dynamic_window_size
        num_offsets = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
        self.relative_position_bias_table = nn.Parameter(
            torch.empty(num_offsets, num_heads, device=device, dtype=dtype))
        self._cache: tuple[tuple[int, int], torch.Tensor, torch.Tensor] | None = None  # of what grid and table, bias
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.relative_position_bias_table)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Resample the table to another grid (height, width)."""
        table = self.relative_position_bias_table
        with torch.no_grad():
            resampled = resample_table(table, window_size, self.window_size)
        self.relative_position_bias_table = nn.Parameter(resampled, requires_grad=table.requires_grad)
        self.window_size = window_size

    def extra_repr(self) -> str:
        return f'window_size={self.window_size}'

    def forward(
            self,
            height: int,
            width: int,
            queries: torch.Tensor | None = None,
            keys: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the bias between all tokens of a grid, or between some of them.

        Args:
            height: Of the grid, in tokens.
            width: Of the grid, in tokens.
            queries: Positions on the grid (..., Q), row-major; height * width for a token that has none. None = all.
            keys: Likewise, (..., K).

        Returns:
            (1, num_heads, N, N), N = height * width, with rows that are aligned in memory; or (..., num_heads, Q, K),
            0 for tokens without position.
        """
        if queries is not None and keys is not None:
            return self._between(queries, keys, height, width)
        if not self.dynamic_window_size or same_grid((height, width), self.window_size):
            height, width = self.window_size  # constants for tracers
        if not torch.jit.is_scripting():
            if self._may_keep():
                return self._kept(height, width)
        return self._compute(height, width)

    def _between(self, queries: torch.Tensor, keys: torch.Tensor, height: int, width: int) -> torch.Tensor:
        table = self._table(height, width)
        num_offsets = table.shape[0]
        y, x = queries[..., :, None] // width, queries[..., :, None] % width
        rows = (y - keys[..., None, :] // width + height - 1) * (2 * width - 1)  # (..., Q, K)
        index = rows + x - keys[..., None, :] % width + width - 1
        outside = (queries[..., :, None] == height * width) | (keys[..., None, :] == height * width)
        index = index.masked_fill(outside, num_offsets)
        values = F.pad(table, (0, 0, 0, 1)).t().contiguous()  # (num_heads, num_offsets + 1), 0 at the end
        bias = values.index_select(1, index.flatten()).reshape([values.shape[0]] + list(index.shape))
        return bias.movedim(0, -3)

    def _table(self, height: int, width: int) -> torch.Tensor:
        """The table for a grid, ((2 * height - 1) * (2 * width - 1), num_heads)."""
        table = self.relative_position_bias_table
        if not self.dynamic_window_size or same_grid((height, width), self.window_size):
            return table
        if not torch.jit.is_scripting():
            if not isinstance(height, int) or torch.compiler.is_compiling():  # perhaps a stand-in
                if torch.jit.is_tracing() or is_exporting():
                    return resample_table_in_graph(table, height, width, self.window_size)
                return torch.ops.timm_itpn.resampled_rel_pos_table(table, height, width, *self.window_size)
        return resample_table(table, (height, width), self.window_size)  # has every derivative

    def _compute(self, height: int, width: int) -> torch.Tensor:
        """Look up the table for all pairs of tokens. In memory, rows are padded to multiples of 8.

        CUDA's memory-efficient attention would copy a bias without that padding to align its rows.
        """
        table = self._table(height, width)
        y = torch.arange(height, device=table.device, dtype=torch.int32)
        x = torch.arange(width, device=table.device, dtype=torch.int32)
        rows = (y[:, None] - y + height - 1) * (2 * width - 1)  # (height, height): query, key
        columns = x[:, None] - x + width - 1  # (width, width)
        index = (rows[:, None, :, None] + columns[:, None, :]).reshape(height * width, height * width)
        in_graph = is_exporting() or torch.jit.is_tracing()  # there the remainder would hold it to some sizes
        if not in_graph:
            index = F.pad(index, (0, -(height * width) % 8))
        if not torch.jit.is_scripting():
            if is_transformed():
                index = index.long()  # the only type that vmap of torch 2.6 takes
        bias = table.t().contiguous().index_select(1, index.flatten())
        bias = bias.reshape(1, -1, height * width, index.shape[1])
        return bias if in_graph else bias[..., :height * width]

    @torch.jit.unused
    def _may_keep(self) -> bool:
        table = self.relative_position_bias_table
        return (
            type(table) is nn.Parameter  # not a stand-in of a tracer or of functorch
            and table.is_cpu
            and not self.training
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
        )

    @torch.jit.unused
    def _kept(self, height: int, width: int) -> torch.Tensor:
        table = self.relative_position_bias_table
        if self._cache is not None:
            grid_size, old, bias = self._cache
            if grid_size == (height, width) and old.dtype == table.dtype and torch.equal(old, table):
                return bias
        bias = self._compute(height, width)
        self._cache = ((height, width), table.detach().clone(), bias) if bias.numel() <= MAX_CACHED else None
        return bias

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_cache': None}

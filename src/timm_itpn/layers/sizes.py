"""Sizes that are known when a forward is traced, and those that are not."""
import torch
import torch.nn.functional as F
from timm.layers import is_exporting
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = ['holds', 'padded', 'same_grid']


def holds(condition: bool) -> bool:
    """A condition on sizes; in a program that is exported, whether it is true of all sizes that the program takes.

    Asking it in `if` would hold such a program to the sizes for which the answer is that of the example. Tracers do not
    know of all sizes, and get False.
    """
    if not torch.jit.is_scripting():
        if isinstance(condition, (torch.fx.Proxy, torch.Tensor)):
            return False
        if is_exporting():
            return statically_known_true(condition)
    return condition


def same_grid(new_size: tuple[int, int], old_size: tuple[int, int]) -> bool:
    """Whether two grids (height, width) are the same, see `holds`; to `torch.jit.trace`, in the example."""
    if torch.jit.is_tracing():
        return bool(new_size[0] == old_size[0]) and bool(new_size[1] == old_size[1])
    return holds(new_size[0] == old_size[0]) and holds(new_size[1] == old_size[1])


def padded(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """Repeat the last row and column of (B, C, H, W) until both sides are multiples."""
    H, W = x.shape[-2], x.shape[-1]
    if holds(H % multiple == 0) and holds(W % multiple == 0):
        return x
    below = (H + multiple - 1) // multiple * multiple - H  # OpenVINO cannot take the remainder of a size
    right = (W + multiple - 1) // multiple * multiple - W
    return F.pad(x, (0, right, 0, below), mode='replicate')

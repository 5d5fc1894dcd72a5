"""What a forward may ask while it is traced, scripted, compiled or exported."""
import torch
from timm.layers import is_exporting
from torch.fx.experimental.symbolic_shapes import statically_known_true


def is_eager(x: torch.Tensor) -> bool:
    """True if `x` is computed with now, not traced; FX has stand-ins for tensors."""
    return isinstance(x, torch.Tensor) and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


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


def constant_grid(height: int, width: int) -> tuple[int, int]:
    """A grid whose sides become constants of a program that is traced or exported: those of the example.

    Raises:
        ValueError: `torch.export` shall make a program for other sizes too; AOTInductor would not ask its guards.
    """
    if torch.jit.is_tracing():
        return int(height), int(width)
    if not torch.jit.is_scripting():
        if is_exporting():
            if isinstance(height, torch.SymInt) or isinstance(width, torch.SymInt):
                raise ValueError(
                    'An accelerated model is exported for images of one size: leave height and width out of '
                    'dynamic_shapes.')
            return len(range(height)), len(range(width))  # a strict export has no SymInt here, and int() keeps it open
    return height, width

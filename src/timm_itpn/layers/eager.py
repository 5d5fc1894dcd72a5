"""Whether layers run now, or are looked at."""
import torch

__all__ = ['is_eager']


def is_eager(x: torch.Tensor) -> bool:
    """True if `x` is computed with now; compilers and tracers want one graph for all devices and batch sizes."""
    seen = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not seen and isinstance(x, torch.Tensor)  # FX has stand-ins for tensors

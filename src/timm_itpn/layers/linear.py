"""Linear layers, computed by what is fastest on the device."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..ops.linear import IMPLEMENTATIONS, TRAINABLE, choose
from .eager import is_eager

__all__ = ['apply_linear', 'is_plain', 'linear']


def is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """True for exactly that class without hooks: what it computes may then be computed elsewhere."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is cls and not any(hooks)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias, as `F.linear`.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,).
    """
    if not torch.jit.is_scripting():
        plain = type(weight) in (nn.Parameter, torch.Tensor)  # not quantised, not sharded
        if plain and is_eager(x) and x.is_cpu and not torch.is_autocast_enabled('cpu'):
            return IMPLEMENTATIONS[choose('auto', weight, TRAINABLE)].forward(x, weight, bias)
    return F.linear(x, weight, bias)


def apply_linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """layer(x) for a Linear layer or what stands in for one. (..., in_features) -> (..., out_features)."""
    if is_eager(x) and is_plain(layer, nn.Linear):
        return linear(x, layer.weight, layer.bias)
    return layer(x)

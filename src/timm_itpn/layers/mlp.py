"""The gated MLP of Fast-iTPN's stage 3."""
from typing import Any

import timm.layers
import torch
import torch.nn as nn
import torch.nn.functional as F

from ..ops.attention import is_transformed
from .tracing import is_eager


class GatedProduct(torch.autograd.Function):
    """silu(gate) * value. Keeps its two inputs for the backward pass, and computes silu(gate) again."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, value)
        return F.silu(gate) * value

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, value = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative, which the operator below does not have
            sigmoid = gate.sigmoid()
            return grad * value * (sigmoid * (1 + gate * (1 - sigmoid))), grad * F.silu(gate)
        return torch.ops.aten.silu_backward(grad * value, gate), grad * F.silu(gate)


class GatedSiLU(nn.Module):
    """silu(gate) * value, both (..., hidden_dim). Keeps a third less for the backward pass than the two operators."""

    def forward(self, gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if torch.is_grad_enabled() and is_eager(gate) and not is_transformed():
                return GatedProduct.apply(gate, value)
        return F.silu(gate) * value


class SwiGLU(timm.layers.SwiGLU):
    """timm's `SwiGLU`: fc2(norm(silu(fc1_g) * fc1_x)), with less memory in training. (..., dim) -> (..., dim).

    Args:
        in_features: Width of a token.
        hidden_features: Width of gate and value.
        kwargs: As for timm's, without `act_layer`.
    """

    def __init__(self, in_features: int, hidden_features: int, **kwargs: Any):
        super().__init__(in_features, hidden_features, act_layer=GatedSiLU, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.fc1_g(x), self.fc1_x(x))
        return self.drop2(self.fc2(self.norm(self.drop1(x))))

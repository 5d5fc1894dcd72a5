"""MLPs of the blocks."""

import timm.layers
import torch
import torch.nn as nn
import torch.nn.functional as F

from .eager import is_eager
from .linear import apply_linear, is_plain, linear

__all__ = ['GatedMlp', 'Mlp']


class GatedProduct(torch.autograd.Function):
    """silu(gate) * value. Keeps its two inputs for the backward pass, and computes silu(gate) again."""
    generate_vmap_rule = True

    @staticmethod
    def forward(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) * value

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, value = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative, which the operator below has not
            sigmoid = gate.sigmoid()
            return grad * value * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid
        return torch.ops.aten.silu_backward(grad * value, gate), grad * F.silu(gate)


class Mlp(timm.layers.Mlp):
    """timm's `Mlp`: fc2(norm(act(fc1))). (..., dim) -> (..., dim).

    Args:
        args: As for timm's.
        kwargs: As for timm's, without `use_conv`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc1(x) if torch.jit.is_scripting() else apply_linear(self.fc1, x)
        x = self.norm(self.drop1(self.act(x)))
        x = self.fc2(x) if torch.jit.is_scripting() else apply_linear(self.fc2, x)
        return self.drop2(x)


class GatedMlp(timm.layers.GluMlp):
    """timm's `GluMlp` with the gate first: fc2(norm(act(gate) * value)). (..., dim) -> (..., dim).

    Gate and value are one layer, `fc1`, and one product on most devices. In float32 on the CPU they are two: MKL was up
    to a fifth slower on one as wide, and what follows reads whole rows then. What the gate makes of the value leaves an
    eighth less for the backward pass of a block than in timm.

    Args:
        args: As for `GluMlp`.
        kwargs: As for `GluMlp`, without `gate_last`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, gate_last=False, **kwargs)

    def _is_split(self, x: torch.Tensor) -> bool:
        plain = is_plain(self.fc1, nn.Linear) and type(self.fc1.weight) is nn.Parameter  # not quantised, say
        return x.is_cpu and x.dtype == torch.float32 and plain and not torch.is_autocast_enabled('cpu')

    def _gated(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (..., hidden_dim), by the device."""
        if self._is_split(x):
            weights, biases = self.fc1.weight.chunk(2), self.fc1.bias.chunk(2)
            gate, value = linear(x, weights[0], biases[0]), linear(x, weights[1], biases[1])
        else:
            gate, value = self.fc1(x).chunk(2, dim=-1)
        if torch.is_grad_enabled() and is_plain(self.act, nn.SiLU):  # calling it takes 0.3 ms
            return GatedProduct.apply(gate, value)
        return self.act(gate) * value

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if is_eager(x):
                return self._gated(x)
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.act(gate) * value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.drop1(self.gated(x)))
        x = self.fc2(x) if torch.jit.is_scripting() else apply_linear(self.fc2, x)
        return self.drop2(x)

"""Gated MLP of Fast-iTPN's stage 3."""
from typing import Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import GluMlp

__all__ = ['GatedMlp']


class GatedMlp(GluMlp):
    """timm's `GluMlp` with the gate first: fc2(norm(act(gate) * value)). (..., dim) -> (..., dim).

    Gate and value are one layer, `fc1`, and one product on most devices. In float32 on the CPU they are two: MKL was up
    to a fifth slower on one as wide, and what follows reads whole rows then.

    Args:
        args: As for `GluMlp`.
        kwargs: As for `GluMlp`, without `gate_last`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, gate_last=False, **kwargs)

    def gate_and_value(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        if not torch.jit.is_scripting():
            if self._is_split(x):
                weights, biases = self.fc1.weight.chunk(2), self.fc1.bias.chunk(2)
                return F.linear(x, weights[0], biases[0]), F.linear(x, weights[1], biases[1])
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return gate, value

    def _is_split(self, x: torch.Tensor) -> bool:
        if not isinstance(x, torch.Tensor) or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False  # one graph for all devices
        plain = type(self.fc1) is nn.Linear and not self.fc1._forward_hooks and not self.fc1._forward_pre_hooks
        return x.is_cpu and x.dtype == torch.float32 and plain and not torch.is_autocast_enabled('cpu')

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.gate_and_value(x)
        x = self.norm(self.drop1(self.act(gate) * value))
        return self.drop2(self.fc2(x))

"""Blocks for inference only, with fewer operations for the same result.

`block.fuse()` makes them: layer scale and the scale of the attention scores go into the linear layer before them;
activations and residual sums are done by `ops.linear`. Norms keep scale and shift, without which PyTorch's kernel for
CPUs is slower. Sums are in another order than before, so results are equal to float error, not to the bit.
"""
from typing import NamedTuple

import torch
import torch.nn as nn
from timm.layers import GELU, LayerScale
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..ops.attention import Heads, attention_weights, fused_attention, is_transformed
from ..ops.linear import can_use_onednn, onednn_linear, pack_for_onednn, plain_linear
from .attention import QkvBias
from .linear import OneDnnLinear
from .mlp import SwiGLU
from .tracing import is_eager


class InferenceOnly(nn.Module):
    """Module that cannot go back to training."""

    def __init__(self):
        super().__init__()
        self.training = False

    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            raise RuntimeError('A fused model is for inference only: train the model that it was made from.')
        return super().train(mode)


class Packed(NamedTuple):
    """A weight as oneDNN wants it, and what tells that the weight has changed since."""
    weight: torch.Tensor
    values: torch.Tensor  # held, so that no later ones can be where these were
    version: tuple[int, int]  # where the values are, and how often they were changed in place
    form: torch.Tensor | None  # None where oneDNN cannot run


class FusedLinear(InferenceOnly):
    """Linear layer, then an activation or a residual sum. (..., in_features) -> (..., out_features).

    Args:
        weight: (out_features, in_features).
        bias: (out_features,), None for none.
        act: One of `ops.linear.ACTIVATIONS`.
    """

    __jit_ignored_attributes__ = ['_packed']

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, act: str = 'none'):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().contiguous(), requires_grad=False)
        self.act = act
        self._packed: Packed | None = None
        self._pack()

    @torch.jit.unused
    def _pack(self) -> torch.Tensor | None:
        """Pack the weight for oneDNN, unless that was done since it was last replaced, moved or changed."""
        weight, packed = self.weight, self._packed
        if weight.is_inference():  # nothing tells when it changes
            return weight if can_use_onednn(weight) else None
        version = weight.data_ptr(), weight._version
        if packed is None or packed.weight is not weight or packed.version != version:
            form = pack_for_onednn(weight) if can_use_onednn(weight) else None
            self._packed = packed = Packed(weight, weight.detach(), version, form)
        return packed.form

    def __getstate__(self):
        return {**self.__dict__, '_packed': None}  # it has no storage that could be copied

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f'{in_features}, {out_features}, act={self.act}, onednn={can_use_onednn(self.weight)}'

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if is_eager(x) and not torch.is_autocast_enabled('cpu'):
                if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
                    raise RuntimeError(
                        'A fused model has no gradients: call it under torch.no_grad(), or use the original.')
                if not is_transformed():
                    packed = self._pack()
                    if packed is not None:
                        return onednn_linear(x, packed, self.bias, self.act, residual)
        return plain_linear(x, self.weight, self.bias, self.act, residual)


class FusedMlp(InferenceOnly):
    """Norm, first layer, activation or gate, perhaps a norm, second layer and residual sum. (..., dim) -> (..., dim).

    Args:
        norm: Norm before the MLP.
        mlp: timm's `Mlp`, or `SwiGLU`.
        ls: Layer scale after it, or Identity.
    """

    def __init__(self, norm: nn.Module, mlp: nn.Module, ls: nn.Module):
        super().__init__()
        gated = isinstance(mlp, SwiGLU)
        act = 'silu' if gated else name_of(mlp.act)
        self.norm1 = norm
        self.fc1 = FusedLinear(*weights_of(mlp.fc1_g if gated else mlp.fc1), act=act or 'none')
        self.act = nn.Identity() if act else mlp.act
        self.value = FusedLinear(*weights_of(mlp.fc1_x)) if gated else None
        self.norm2 = mlp.norm
        self.fc2 = FusedLinear(*fold_scale(ls, *weights_of(mlp.fc2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        hidden = self.act(self.fc1(y))
        if self.value is not None:
            hidden = hidden * self.value(y)
        return self.fc2(self.norm2(hidden), x)


class FusedAttentionBlock(InferenceOnly):
    """`AttentionBlock` for inference. (B, N, dim) -> (B, N, dim)."""
    fused_attn: torch.jit.Final[bool]
    score_scale = 1.  # it is in the weights

    def __init__(self, block: nn.Module):
        super().__init__()
        attn = block.attn
        self.num_heads = attn.num_heads
        self.fused_attn = attn.fused_attn
        self.rel_pos_bias = block.rel_pos_bias
        weight, bias = weights_of(attn.qkv)
        if type(attn.qkv_bias) is QkvBias:
            bias = attn.qkv_bias.packed()
        elif type(attn.qkv_bias) is not nn.Identity:  # its biases would be lost
            raise ValueError(f'{type(attn.qkv_bias).__name__} cannot be fused: put the biases of q and v back first.')
        self.norm = block.norm1
        dim = attn.proj.in_features
        scale = torch.ones(3 * dim, dtype=weight.dtype, device=weight.device)
        scale[:dim] = (dim // attn.num_heads) ** -0.5  # of the scores, in q
        self.qkv = FusedLinear(scale[:, None] * weight, scale * bias)
        self.proj = FusedLinear(*fold_scale(block.ls1, *weights_of(attn.proj)))
        self.mlp = FusedMlp(block.norm2, block.mlp, block.ls2)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (..., dim) -> queries, keys and values (..., 3, num_heads, head_dim)."""
        return self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1))

    def attend(self, x: torch.Tensor, heads: Heads, bias: torch.Tensor | None) -> torch.Tensor:
        """Add to the tokens what attention makes of queries, keys and values."""
        q, k, v = heads
        if self.fused_attn:
            y = fused_attention(q, k, v, bias, scale=1.)
        else:
            y = attention_weights(q, k, bias, scale=1.).type_as(v) @ v
        return self.proj(y.transpose(1, 2).reshape(x.shape), x)

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        """Add to the tokens what the MLP makes of them."""
        return self.mlp(x)

    def forward(
            self, x: torch.Tensor, height: int, width: int, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens (B, N, dim), of a `height` x `width` grid where there is a relative position bias -> (B, N, dim)."""
        if self.rel_pos_bias is not None:
            own = self.rel_pos_bias(height, width)
            bias = own if bias is None else own + bias
        q, k, v = self.project(x).permute(2, 0, 3, 1, 4).unbind(0)  # each (B, num_heads, N, head_dim)
        return self.feed(self.attend(x, (q, k, v), bias))


def name_of(act: nn.Module) -> str | None:
    """Name of an activation in `ops.linear`, None for one that is not there."""
    if isinstance(act, GELU) or (isinstance(act, nn.GELU) and act.approximate == 'none'):
        return 'gelu'
    return 'silu' if isinstance(act, nn.SiLU) else None


def weights_of(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a Linear layer.

    Raises:
        ValueError: It is of another class, an adapter say, whose weight is not all that it does; or its weight is of
            another class, quantised or sharded.
    """
    if type(layer) not in (nn.Linear, OneDnnLinear, FusedLinear):
        raise ValueError(f'{type(layer).__name__} cannot be fused: merge adapters into the Linear layers first.')
    if is_traceable_wrapper_subclass(layer.weight):
        raise ValueError(f'A weight that is a {type(layer.weight).__name__} cannot be fused: quantise or shard later.')
    return layer.weight, layer.bias


def fold_scale(ls: nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move a layer scale into the linear layer before it: (out_features, in_features) and (out_features,)."""
    if not isinstance(ls, LayerScale):
        return weight, bias
    return ls.gamma[:, None] * weight, ls.gamma * bias

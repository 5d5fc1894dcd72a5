"""What the package is measured against: the backbone and classifier of Fast-iTPN, computed the way it is written down.

Stages 1 and 2 keep (B, C, H, W) maps and permute them around every norm; q, k and v have a layer each, and so have
gate and value of the MLP; scores and softmax are float32 tensors of N x N. Parameters have the official names, so the
numbers of the official models hold here as well (`tests/bench/test_baseline.py`). Dropout and stochastic depth are left
out: the benchmark runs without.

The pyramid, where there is one, is ours: its stages are maps (B, H, W, C), so those from here are permuted for it, and
its levels permuted back. Compared are then two backbones under one pyramid.
"""
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerNorm2d

from ..layers.pyramid import FeaturePyramid

EPS = 1e-6
MLP_RATIO = 3  # hidden width per width
NUM_LEVELS = 5  # of the pyramid, strides 4 to 64


class ConvBlock(nn.Module):
    """Block of stages 1 and 2 on (B, C, H, W)."""

    def __init__(self, dim: int):
        super().__init__()
        hidden_dim = MLP_RATIO * dim
        self.norm2 = LayerNorm2d(dim, eps=EPS)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Conv2d(dim, hidden_dim, 1),
            act=nn.GELU(),
            ffn_ln=LayerNorm2d(hidden_dim, eps=EPS),
            fc2=nn.Conv2d(hidden_dim, dim, 1),
        ))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm2(x))


class Merge(nn.Sequential):
    """(B, C, H, W) -> (B, 2C, H/2, W/2)."""

    def __init__(self, dim: int):
        super().__init__(OrderedDict(
            norm=LayerNorm2d(dim, eps=EPS), reduction=nn.Conv2d(dim, 2 * dim, kernel_size=2, stride=2)))


class Attention(nn.Module):
    """Attention that holds the scores of all pairs of tokens in float32."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        q = F.linear(x, self.q_proj.weight, self.q_bias)
        k = self.k_proj(x)
        v = F.linear(x, self.v_proj.weight, self.v_bias)
        q, k, v = (t.reshape(B, N, self.num_heads, -1).permute(0, 2, 1, 3) for t in (q, k, v))
        scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-2, -1)  # (B, num_heads, N, N)
        x = scores.softmax(dim=-1).type_as(x) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class SwiGlu(nn.Module):
    """Gated MLP with a norm inside."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim)
        self.w2 = nn.Linear(dim, hidden_dim)
        self.ffn_ln = nn.LayerNorm(hidden_dim, eps=EPS)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class TokenBlock(nn.Module):
    """Block of stage 3 on (B, N, C)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, num_heads)
        self.gamma_1 = nn.Parameter(torch.full((dim,), 0.1))
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = SwiGlu(dim, MLP_RATIO * dim)
        self.gamma_2 = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.gamma_1 * self.attn(self.norm1(x))
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class Baseline(nn.Module):
    """Fast-iTPN, unfused: a classifier, (B, 3, H, W) -> (B, num_classes), unless one of the last two is given.

    Args:
        img_size: (height, width) in pixels, multiples of 16.
        num_classes: Classes.
        embed_dim: Width of stage 3.
        depths: Blocks of stages 1, 2 and 3.
        num_heads: Attention heads of stage 3.
        pyramid: A feature pyramid in place of the classifier. (B, 3, H, W) -> its levels, maps (B, C, h, w).
        templates: (B, n, 3, h, w), which a tracker encodes anew with each frame. (B, 3, H, W) -> [map of the frame].
    """

    def __init__(
            self,
            img_size: tuple[int, int] = (224, 224),
            num_classes: int = 1000,
            embed_dim: int = 512,
            depths: tuple[int, int, int] = (3, 3, 24),
            num_heads: int = 8,
            pyramid: FeaturePyramid | None = None,
            templates: torch.Tensor | None = None,
    ):
        super().__init__()
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, embed_dim // 4, 4, stride=4)))
        blocks: list[nn.Module] = []
        for dim, depth in zip((embed_dim // 4, embed_dim // 2), depths):
            blocks += [*(ConvBlock(dim) for _ in range(depth)), Merge(dim)]
        self.num_maps = len(blocks)  # blocks on (B, C, H, W)
        blocks += [TokenBlock(embed_dim, num_heads) for _ in range(depths[2])]
        self.blocks = nn.ModuleList(blocks)
        sizes = [img_size] if templates is None else [img_size, templates.shape[-2:]]
        num_tokens = sum(height // 16 * (width // 16) for height, width in sizes)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, num_tokens, embed_dim))
        self.pyramid = pyramid
        self.templates = None if templates is None else nn.Buffer(templates, persistent=False)
        if pyramid is None:
            self.fc_norm = nn.LayerNorm(embed_dim, eps=EPS)
        if pyramid is None and templates is None:
            self.head = nn.Linear(embed_dim, num_classes)

    def embed(self, images: torch.Tensor, pos_embed: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Images (B, 3, H, W) -> tokens (B, N, C) of stage 3; and for a pyramid the maps of stages 1 and 2."""
        maps = []
        x = self.patch_embed(images)
        for block in self.blocks[:self.num_maps]:
            if self.pyramid is not None and isinstance(block, Merge):
                maps.append(x)
            x = block(x)
        return x.flatten(2).mT + pos_embed, maps  # (B, C, H, W) -> (B, N, C)

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        grid_size = x.shape[-2] // 16, x.shape[-1] // 16
        num = grid_size[0] * grid_size[1]
        tokens, maps = self.embed(x, self.pos_embed[:, :num])
        if self.templates is not None:
            others, _ = self.embed(self.templates.flatten(0, 1), self.pos_embed[:, num:])
            others = others.reshape(len(x), -1, others.shape[2])  # (B*n, N, C) -> (B, n*N, C)
            tokens = torch.cat((tokens, others), dim=1)
        for block in self.blocks[self.num_maps:]:
            tokens = block(tokens)
        if self.templates is not None:
            return [self.fc_norm(tokens)[:, :num].mT.unflatten(2, grid_size)]  # (B, N, C) -> (B, C, H, W)
        if self.pyramid is None:
            return self.head(self.fc_norm(tokens.mean(dim=1)))
        maps.append(tokens.mT.unflatten(2, grid_size))
        levels = self.pyramid([each.permute(0, 2, 3, 1) for each in maps], list(range(NUM_LEVELS)))
        return [level.permute(0, 3, 1, 2).contiguous() for level in levels]  # (B, H, W, C) -> (B, C, H, W)

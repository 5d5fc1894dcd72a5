"""Objectives that need no teacher: the pixels of the image, or the features that a moving average of the student has.

Masked tokens are dropped before stage 1. Mask tokens fill the gaps in what the pyramid makes of the others, and a
decoder predicts.
"""
import math
from functools import reduce
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from timm.layers import LayerNorm, build_sincos2d_pos_embed, trunc_normal_
from timm.models.vision_transformer import Block
from timm.utils import ModelEmaV3

from ..engine.task import Losses
from ..layers.stages import stage_maps
from .base import STEM_SIDE, LevelsToTokens, Objective, Student, init_linear

STRIDE = 16
VARIANCE_EPS = 1e-6


class Pixel(Objective):
    """iTPN's, after MAE: mean squared error to the pixels of masked tokens, normalised within each token.

    Args:
        student: With pyramid and without relative position bias; its position embedding becomes a fixed one.
        num_masked: Tokens that are masked in every image.
        decoder_dim: Width of the decoder.
        decoder_depth: Its blocks.
        decoder_num_heads: Its attention heads.
    """
    NAME = 'pixel'
    MASKING = 'random'
    MASK_RATIO = 0.75
    STUDENT = {
        'fast_itpn': dict(pyramid=True),
        'itpn': dict(pyramid=True, init_values=0., pyramid_depth=2, rel_pos_bias=False),
    }

    def __init__(
            self,
            student: Student,
            num_masked: int,
            decoder_dim: int = 512,
            decoder_depth: int = 8,
            decoder_num_heads: int = 16,
    ):
        super().__init__(student, num_masked)
        stage: Any = student.stages[2]
        if stage.blocks[0].rel_pos_bias is not None:
            raise ValueError('Tokens are dropped, so there is no grid: create the student with rel_pos_bias=False.')
        if hasattr(stage, 'gather_window'):
            raise ValueError('Tokens are dropped, so there are no windows: create the student without acceleration.')
        stage.pos_embed.data.copy_(sincos_pos_embed(self.grid_size, student.embed_dim))
        stage.pos_embed.requires_grad_(False)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.decoder_embed = LevelsToTokens(student.feature_info[0]['num_chs'], decoder_dim)
        self.decoder_pos_embed = nn.Parameter(sincos_pos_embed(self.grid_size, decoder_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList([
            Block(decoder_dim, decoder_num_heads, mlp_ratio=4., qkv_bias=True, norm_layer=LayerNorm)
            for _ in range(decoder_depth)])
        self.decoder_norm = LayerNorm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, STRIDE * STRIDE * student.in_chans)
        trunc_normal_(self.mask_token, std=.02)
        init_linear((self.decoder_embed, self.decoder_blocks, self.decoder_pred))

    def encode(self, images: torch.Tensor, visible: torch.Tensor) -> list[torch.Tensor]:
        """What the decoder sees of the visible tokens (B, K): of each level (B, K, decoder_dim), coarse first."""
        return self.tokens_of_levels(self.visible_maps(images, visible))

    def visible_maps(self, images: torch.Tensor, visible: torch.Tensor) -> list[torch.Tensor]:
        """Maps of the three stages for the visible tokens only; the others are dropped before stage 1.

        Everything but attention stays inside one patch, so K visible patches make a map of one row: (B, 1, K, dim)
        after stage 3, and four and two times as high and wide before.

        Args:
            images: (B, 3, H, W).
            visible: (B, K), indices of the visible tokens.
        """
        first, second, third = self.backbone.stages
        x = self.backbone.patch_embed(images)
        x = rearrange(x, 'b (h y) (w x) c -> b (h w) y x c', y=STEM_SIDE, x=STEM_SIDE)
        x = torch.take_along_dim(x, visible[..., None, None, None], dim=1)
        fine = first(rearrange(x, 'b k y x c -> b y (k x) c'))
        middle = second(fine)
        x = third.downsample(middle).flatten(1, 2)  # (B, 1, K, C) -> (B, K, C)
        x = third.pos_drop(x + torch.take_along_dim(third.pos_embed, visible[..., None], dim=1))
        x = third.forward_blocks(x, 1, x.shape[1])
        return [fine, middle, x[:, None]]

    def decode(self, x: torch.Tensor, visible: torch.Tensor, num_mask_tokens: int) -> torch.Tensor:
        """Fill the gaps and run the decoder, (B, K, decoder_dim) -> (B, N, decoder_dim).

        Args:
            x: Of the visible tokens.
            visible: (B, K), their indices.
            num_mask_tokens: How many mask tokens are summed in each gap, one per level.
        """
        B, _, D = x.shape
        gaps = (num_mask_tokens * self.mask_token).to(x.dtype).expand(B, self.decoder_pos_embed.shape[1], D)
        x = gaps.scatter(1, visible[..., None].expand(-1, -1, D), x) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)

    def predict(self, images: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Prediction of the normalised pixels, (B, N, 768), of all tokens; values are in (y, x, channel) order."""
        visible = keep_indices(masked, self.num_masked)
        levels = self.encode(images, visible)
        return self.decoder_pred(self.decode(reduce(torch.add, levels), visible, len(levels)))

    def forward(self, images: torch.Tensor, masked: torch.Tensor, target: torch.Tensor | None = None) -> Losses:
        return {'loss': self.mean_of_masked(pixel_error(self.predict(images, masked), images), masked)}


class Mfm(Pixel):
    """The paper's masked feature modelling: what a moving average of the student's stages makes of the whole image.

    Stages 1, 2 and 3 of the average are the targets of the levels at strides 4, 8 and 16, normalised per token; the
    finest level predicts pixels too. One decoder serves all levels. The paper leaves the momentum, the loss (here
    cosine similarity) and the normalisation open.

    Args:
        student: As in `Pixel`.
        num_masked: Tokens that are masked in every image.
        momentum: Of the average at the start; it grows to 1 at the end as half a cosine.
        kwargs: As for `Pixel`.
    """
    NAME = 'mfm'

    def __init__(self, student: Student, num_masked: int, momentum: float = 0.996, **kwargs: Any):
        super().__init__(student, num_masked, **kwargs)
        self.momentum = momentum
        dim, decoder_dim = student.embed_dim, self.decoder_pos_embed.shape[-1]
        # of a token, all positions of a level together: dim, 4 * dim / 2, 16 * dim / 4
        self.decoder_features = nn.ModuleList([nn.Linear(decoder_dim, dim * 2 ** i) for i in range(3)])
        init_linear(self.decoder_features)
        self.average = ModelEmaV3(student, decay=momentum)
        self.average.requires_grad_(False)

    def train(self, mode: bool = True) -> 'Mfm':
        super().train(mode)
        self.average.eval()
        return self

    def after_update(self, progress: float) -> None:
        self.average.decay = 1 - (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2
        self.average.update(self.backbone)

    @torch.no_grad()
    def targets(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Features of the average, (B, N, dim), (B, N, 2 * dim) and (B, N, 4 * dim), coarse first."""
        teacher = self.average.module
        maps = stage_maps(teacher.stages, teacher.patch_embed(images))
        targets = [
            rearrange(level, 'b (h y) (w x) c -> b (h w) (y x c)', y=2 ** i, x=2 ** i)
            for i, level in enumerate(maps[::-1])]
        return [F.layer_norm(target.float(), target.shape[-1:]) for target in targets]

    def forward(self, images: torch.Tensor, masked: torch.Tensor, target: torch.Tensor | None = None) -> Losses:
        visible = keep_indices(masked, self.num_masked)
        losses: Losses = {}
        levels = zip((16, 8, 4), self.encode(images, visible), self.decoder_features, self.targets(images))
        for stride, level, head, features in levels:
            decoded = self.decode(level, visible, 1)
            error = 1 - F.cosine_similarity(head(decoded).float(), features, dim=-1)
            losses[f'stride{stride}'] = self.mean_of_masked(error, masked)
        losses['pixel'] = self.mean_of_masked(pixel_error(self.decoder_pred(decoded), images), masked)
        return {'loss': torch.stack(list(losses.values())).sum(), **{k: loss.detach() for k, loss in losses.items()}}

    def predict(self, images: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        visible = keep_indices(masked, self.num_masked)
        return self.decoder_pred(self.decode(self.encode(images, visible)[-1], visible, 1))


def keep_indices(masked: torch.Tensor, num_masked: int) -> torch.Tensor:
    """Indices of the tokens that are not masked, in raster order.

    Args:
        masked: (B, H, W), True where masked.
        num_masked: In every image.

    Returns:
        (B, H * W - num_masked).
    """
    masked = masked.flatten(1)
    order = masked.to(torch.uint8).argsort(dim=1, stable=True)  # stable=True: raster order
    return order[:, :masked.shape[1] - num_masked]


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) -> (B, N, 256 * C), float32: the pixels of each token, in (y, x, channel) order."""
    return rearrange(images.float(), 'b c (h y) (w x) -> b (h w) (y x c)', y=STRIDE, x=STRIDE)


def pixel_error(prediction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each token (B, N), to its pixels less their mean, by their standard deviation."""
    target = pixels(images)
    variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
    target = (target - mean) / (variance + VARIANCE_EPS).sqrt()
    return (prediction.float() - target).square().mean(dim=-1)


def sincos_pos_embed(grid_size: tuple[int, int], dim: int) -> torch.Tensor:
    """Fixed position embedding (1, height * width, dim).

    Half of the channels are of the column, half of the row, each first sines, then cosines.

    Args:
        grid_size: Tokens (height, width).
        dim: Channels, a multiple of 4.
    """
    height, width = grid_size
    pos_embed = build_sincos2d_pos_embed([height, width], dim, reverse_coord=True, interleave_sin_cos=True)
    return rearrange(pos_embed, '(w h) d -> 1 (h w) d', h=height)

"""Objectives of an image's own: its pixels, or features that a moving average of the student has of it.

Masked tokens are dropped before stage 1. What the pyramid makes of the others is filled up by mask tokens and goes
through a decoder.
"""
import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from timm.layers import LayerNorm, trunc_normal_
from timm.models.vision_transformer import Block
from timm.utils import ModelEmaV3

from ..models.itpn import ITPN
from .clip import init_linear
from .decoders import LinearLevels
from .objective import Objective
from .positions import sincos_positions
from .student import check_no_grid, keep_indices, levels_of, split_patches, stage_maps, visible_maps

__all__ = ['Mfm', 'Pixel', 'normalised_pixels', 'pixels']

STRIDE = 16
VARIANCE_EPS = 1e-6


class Pixel(Objective):
    """iTPN's, after MAE: mean squared error to the pixels of masked tokens, normalised within each token.

    Args:
        backbone: The student, with pyramid and without relative position bias; its positions become fixed ones.
        num_masked: Tokens that are masked in every image.
        decoder_dim: Width of the decoder.
        decoder_depth: Its blocks.
        decoder_num_heads: Its attention heads.
        pyramid: False = the decoder sees stage 3, not the pyramid, which is then not trained; to compare with.
    """
    NAME = 'pixel'
    MASKING = 'random'
    MASK_RATIO = 0.75
    STUDENT: dict[str, dict[str, Any]] = {
        'fast_itpn': dict(pyramid=True),
        'itpn': dict(pyramid=True, init_values=0., pyramid_depth=2, rel_pos_bias=False),
    }

    def __init__(
            self,
            backbone: ITPN,
            num_masked: int,
            decoder_dim: int = 512,
            decoder_depth: int = 8,
            decoder_num_heads: int = 16,
            pyramid: bool = True,
    ):
        super().__init__(backbone, num_masked)
        check_no_grid(backbone)
        positions = backbone.stages[2].pos_embed
        positions.data.copy_(sincos_positions(self.grid_size, backbone.embed_dim))
        positions.requires_grad_(False)
        self.pyramid = pyramid
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        if pyramid:
            self.decoder_embed = LinearLevels(backbone.pyramid.levels[0].align.out_features, decoder_dim)
        else:
            backbone.pyramid.requires_grad_(False)
            self.decoder_embed = nn.ModuleList([
                nn.Sequential(LayerNorm(backbone.embed_dim), nn.Linear(backbone.embed_dim, decoder_dim))])
        self.decoder_pos_embed = nn.Parameter(sincos_positions(self.grid_size, decoder_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList([
            Block(decoder_dim, decoder_num_heads, mlp_ratio=4., qkv_bias=True, norm_layer=LayerNorm)
            for _ in range(decoder_depth)])
        self.decoder_norm = LayerNorm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, STRIDE * STRIDE * backbone.in_chans)
        trunc_normal_(self.mask_token, std=.02)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            part.apply(init_linear)

    def shares(self, images: torch.Tensor, visible: torch.Tensor) -> list[torch.Tensor]:
        """What each level gives for the visible tokens, (B, K, decoder_dim), coarse first."""
        maps = visible_maps(self.backbone, images, visible)
        if not self.pyramid:
            return [self.decoder_embed[0](maps[2][:, 0])]
        return self.decoder_embed(levels_of(self.backbone, maps))

    def decode(self, share: torch.Tensor, visible: torch.Tensor, num_mask_tokens: int) -> torch.Tensor:
        """Fill the gaps and run the decoder, (B, K, decoder_dim) -> (B, N, decoder_dim).

        Args:
            share: Of the visible tokens.
            visible: (B, K), their indices.
            num_mask_tokens: How many mask tokens are summed in each gap, one per level.
        """
        B, _, D = share.shape
        gaps = (num_mask_tokens * self.mask_token).to(share.dtype).expand(B, self.decoder_pos_embed.shape[1], D)
        x = gaps.scatter(1, visible[..., None].expand(-1, -1, D), share)
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)

    def predict(self, images: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Prediction of the normalised pixels, (B, N, 768), of all tokens; values are in (y, x, channel) order."""
        visible = keep_indices(masked, self.num_masked)
        shares = self.shares(images, visible)
        return self.decoder_pred(self.decode(sum(shares), visible, len(shares)))

    def forward(
            self,
            images: torch.Tensor,
            masked: torch.Tensor,
            target: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        prediction = self.predict(images, masked)
        return {'loss': self.at_masked(pixel_error(prediction, images), masked)}

    def at_masked(self, error: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Mean over the masked tokens of (B, N)."""
        return (error * masked.flatten(1)).sum() / (len(error) * self.num_masked)


class Mfm(Pixel):
    """The paper's masked feature modelling: what a moving average of the student's stages makes of the whole image.

    Stages 1, 2 and 3 of the average are the targets of the levels at strides 4, 8 and 16, normalised per token; the
    finest level predicts pixels too. One decoder serves all levels. The paper leaves the momentum, the loss and the
    normalisation open.

    Args:
        backbone: As in `Pixel`.
        num_masked: Tokens that are masked in every image.
        momentum: Of the average at the start; it grows to 1 at the end as half a cosine.
        feature_loss: 'cosine' or 'smooth_l1'.
        kwargs: As for `Pixel`.
    """
    NAME = 'mfm'

    def __init__(
            self,
            backbone: ITPN,
            num_masked: int,
            momentum: float = 0.996,
            feature_loss: str = 'cosine',
            **kwargs: Any,
    ):
        super().__init__(backbone, num_masked, **kwargs)
        if not self.pyramid:
            raise ValueError('The objective mfm has no form without pyramid: its levels are what learns.')
        if feature_loss not in FEATURE_LOSSES:
            raise ValueError(f'feature_loss {feature_loss!r} is unknown, use one of {tuple(FEATURE_LOSSES)}')
        self.momentum = momentum
        self.feature_loss = feature_loss
        dim, decoder_dim = backbone.embed_dim, self.decoder_norm.normalized_shape[0]
        # of a token, all positions of a level together: dim, 4 * dim / 2, 16 * dim / 4
        self.decoder_features = nn.ModuleList([nn.Linear(decoder_dim, dim * 2 ** i) for i in range(3)])
        self.decoder_features.apply(init_linear)
        self.average = ModelEmaV3(backbone, decay=momentum)
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
        maps = stage_maps(teacher, teacher.patch_embed(images))
        targets = [split_patches(level, 2 ** i).flatten(2) for i, level in enumerate(maps[::-1])]
        return [F.layer_norm(target.float(), target.shape[-1:]) for target in targets]

    def forward(
            self,
            images: torch.Tensor,
            masked: torch.Tensor,
            target: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        visible = keep_indices(masked, self.num_masked)
        compare = FEATURE_LOSSES[self.feature_loss]
        losses: dict[str, torch.Tensor] = {}
        levels = zip((16, 8, 4), self.shares(images, visible), self.decoder_features, self.targets(images))
        for stride, share, head, features in levels:
            decoded = self.decode(share, visible, 1)
            losses[f'stride{stride}'] = self.at_masked(compare(head(decoded).float(), features), masked)
        losses['pixel'] = self.at_masked(pixel_error(self.decoder_pred(decoded), images), masked)
        return {'loss': sum(losses.values()), **{key: value.detach() for key, value in losses.items()}}

    def predict(self, images: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        visible = keep_indices(masked, self.num_masked)
        return self.decoder_pred(self.decode(self.shares(images, visible)[-1], visible, 1))


FEATURE_LOSSES = {
    'cosine': lambda prediction, target: 1 - F.cosine_similarity(prediction, target, dim=-1),
    'smooth_l1': lambda prediction, target: F.smooth_l1_loss(prediction, target, reduction='none').mean(dim=-1),
}


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) -> (B, N, 256 * C), float32: the pixels of each token, in (y, x, channel) order."""
    return rearrange(images.float(), 'b c (h y) (w x) -> b (h w) (y x c)', y=STRIDE, x=STRIDE)


def normalised_pixels(images: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) -> (B, N, 256 * C): pixels of each token less their mean, by their standard deviation."""
    x = pixels(images)
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True)
    return (x - mean) / (variance + VARIANCE_EPS).sqrt()


def pixel_error(prediction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each token, (B, N)."""
    return (prediction.float() - normalised_pixels(images)).square().mean(dim=-1)

"""Objectives of a CLIP teacher: its tokens are predicted from an image of which a part is masked."""
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerNorm, trunc_normal_

from ..engine.task import Losses
from ..layers.blocks import AttentionBlock
from ..layers.stages import stage_maps
from .base import STEM_SIDE, LevelsToTokens, Objective, Student, init_linear

STEM_GRADIENT = 0.1  # factor on the gradient of the patch embedding


class Clip(Objective):
    """Fast-iTPN's: minus the mean cosine similarity to the teacher's tokens, at masked tokens.

    The mask token replaces what the stem makes of a masked patch. All three levels of the pyramid take part.

    Args:
        student: Fast-iTPN with pyramid.
        num_masked: Tokens that are masked in every image.
        teacher_dim: Channels of the teacher's tokens.
    """
    NAME = 'clip'
    TEACHER = True
    STUDENT = {'fast_itpn': dict(pyramid=True, init_values=0.1)}

    def __init__(self, student: Student, num_masked: int, teacher_dim: int):
        super().__init__(student, num_masked)
        dim = student.embed_dim
        self.mask_token = nn.Parameter(torch.empty(1, 1, 4 * dim))  # (channel, y, x) of the stem's 4 x 4 positions
        self.decoder_embed = LevelsToTokens(student.feature_info[0]['num_chs'], dim, conv=True)
        self.lm_head = nn.Linear(dim, teacher_dim)
        trunc_normal_(self.mask_token, std=.02, a=-.02, b=.02)
        nn.init.xavier_normal_(self.lm_head.weight)
        nn.init.zeros_(self.lm_head.bias)

    def masked_stem(self, images: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """The stem's map (B, H / 4, W / 4, dim / 4), the mask token where masked."""
        x = self.backbone.patch_embed(images)
        x = STEM_GRADIENT * x + (1 - STEM_GRADIENT) * x.detach()
        B, H, W, C = x.shape
        token = self.mask_token.reshape(C, STEM_SIDE, STEM_SIDE).permute(1, 2, 0)[:, None]  # (4, 1, 4, C)
        x = x.reshape(B, H // STEM_SIDE, STEM_SIDE, W // STEM_SIDE, STEM_SIDE, C)
        x = torch.where(masked[:, :, None, :, None, None], token.to(x.dtype), x)
        return x.reshape(B, H, W, C)

    def predict(self, images: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Prediction of the teacher's tokens, (B, N, teacher_dim), of all tokens."""
        maps = stage_maps(self.backbone.stages, self.masked_stem(images, masked))
        return self.lm_head(self.backbone.pyramid.norm(sum(self.tokens_of_levels(maps))))

    def forward(self, images: torch.Tensor, masked: torch.Tensor, target: torch.Tensor | None = None) -> Losses:
        assert target is not None
        similarity = F.cosine_similarity(self.predict(images, masked).float(), target.float(), dim=-1)  # (B, N)
        return {'loss': -self.mean_of_masked(similarity, masked)}


class ClipDistill(Objective):
    """iTPN's: smooth L1 to the teacher's tokens, at all tokens, by the pyramid and by an auxiliary branch.

    The mask token replaces masked tokens at the input of stage 3. The auxiliary branch starts within stage 3.

    Args:
        student: iTPN with pyramid and relative position bias.
        num_masked: Tokens that are masked in every image.
        teacher_dim: Channels of the teacher's tokens.
    """
    NAME = 'clip-distill'
    TEACHER = True
    STUDENT = {'itpn': dict(pyramid=True, init_values=0.1, pyramid_depth=1)}
    AUXILIARY_DEPTH = 2
    AUXILIARY_START = 0.75  # after the block of this share of the depth
    AUXILIARY_NORM = partial(LayerNorm, eps=1e-5)

    def __init__(self, student: Student, num_masked: int, teacher_dim: int):
        super().__init__(student, num_masked)
        dim = student.embed_dim
        stage: Any = student.stages[2]
        block = stage.blocks[0]
        if hasattr(stage, 'gather_window'):
            raise ValueError('The objective clip-distill is for students without acceleration.')
        if block.rel_pos_bias is None:
            raise ValueError('The objective clip-distill needs relative position bias: rel_pos_bias=True.')
        self.auxiliary_start = int(self.AUXILIARY_START * len(stage.blocks)) + 1
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.decoder_embed = LevelsToTokens(student.feature_info[0]['num_chs'], dim)
        self.norm = LayerNorm(dim)
        self.lm_head = nn.Linear(dim, teacher_dim)
        self.cls_pt_layers = nn.ModuleList([
            AttentionBlock(
                dim, block.attn.num_heads, window_size=self.grid_size, init_values=0.1, norm_layer=self.AUXILIARY_NORM)
            for _ in range(self.AUXILIARY_DEPTH)])
        self.norm_cls = LayerNorm(dim)
        self.lm_cls_head = nn.Linear(dim, teacher_dim)
        trunc_normal_(self.mask_token, std=.02)
        init_linear((self.decoder_embed, self.lm_head, self.cls_pt_layers, self.lm_cls_head))

    def predict(self, images: torch.Tensor, masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions of the teacher's tokens, (B, N, teacher_dim), by the pyramid and by the auxiliary branch."""
        first, second, third = self.backbone.stages
        fine = first(self.backbone.patch_embed(images))
        middle = second(fine)
        x = third.downsample(middle)
        B, H, W, C = x.shape
        x = torch.where(masked[..., None], self.mask_token[:, :, None].to(x.dtype), x)
        x = third.add_positions(x).reshape(B, H * W, C)
        x = auxiliary = third.forward_blocks(x, H, W, 0, self.auxiliary_start)
        x = third.forward_blocks(x, H, W, self.auxiliary_start)
        for block in self.cls_pt_layers:
            auxiliary = block(auxiliary, H, W)
        tokens = self.tokens_of_levels([fine, middle, x.reshape(B, H, W, C)])
        return self.lm_head(self.norm(sum(tokens))), self.lm_cls_head(self.norm_cls(auxiliary))

    def forward(self, images: torch.Tensor, masked: torch.Tensor, target: torch.Tensor | None = None) -> Losses:
        assert target is not None
        main, auxiliary = (F.smooth_l1_loss(x.float(), target.float()) for x in self.predict(images, masked))
        return {'loss': main + auxiliary, 'pyramid': main.detach(), 'auxiliary': auxiliary.detach()}

""" Fast-iTPN

A hierarchical vision transformer of three stages: two MLP-only stages at strides 4 and 8, then a plain transformer at
stride 16. No class token. Pre-trained together with its feature pyramid, against CLIP.

Paper: 'Fast-iTPN: Integrally Pre-Trained Transformer Pyramid Network with Token Migration',
    https://arxiv.org/abs/2211.12735 (TPAMI 2024)
Upstream project: https://github.com/sunsmarterjie/iTPN. This file is written from the paper and from published facts
about the models, not from that code; it is Apache-2.0 as the rest of this package.

Differs from upstream:
  * q, k, v are one matrix, and so are the two input halves of the SwiGLU; merges open a stage instead of standing
    between blocks. `checkpoint_filter_fn` converts official files.
  * features are channels-last maps (B, H, W, C) in all stages, so every feature extractor of timm works.
  * any size whose sides are multiples of 16; fused attention.
  * the pyramid of pre-training comes with the backbone (`fast_itpn_*_fpn`).
"""
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn as nn
from timm.layers import LayerNorm, LayerType, calculate_drop_path_rates, get_act_layer, get_norm_layer
from timm.models import generate_default_cfgs, register_model, register_model_deprecations

from ..acceleration.schedule import parse_schedule
from ..acceleration.stage import attention_stage
from ..layers.patch_embed import ConvPatchMerge, ConvPatchSplit, StemPatchEmbed
from ..layers.pyramid import FeaturePyramid
from ..layers.stages import MlpStage
from .base import BaseITPN, cfg, checkpoint_filter_fn, create

__all__ = ['FastITPN', 'checkpoint_filter_fn']


class FastITPN(BaseITPN):
    """Fast-iTPN backbone and classifier.

    Args:
        img_size: Image side or (height, width) in pixels, multiples of 16.
        in_chans: Image channels.
        num_classes: Classes, 0 for no classifier.
        global_pool: Pooling of the tokens: 'avg', 'max', 'avgmax', or '' for none.
        embed_dim: Width of stage 3; stages 1 and 2 have a quarter and a half of it.
        depths: Blocks of stages 1, 2 and 3.
        num_heads: Attention heads of stage 3.
        mlp_ratio: Hidden channels per channel, in all stages.
        init_values: Layer scale of stage 3 at initialisation, 0 or None for no layer scale.
        attn_impl: How attention is computed: 'sdpa', 'flex', 'reference', or 'auto' for the first that can run.
        drop_rate: Dropout rate before the classifier.
        pos_drop_rate: Dropout rate after the position embedding.
        proj_drop_rate: Dropout rate after each attention and MLP.
        attn_drop_rate: Dropout rate of attention weights.
        drop_path_rate: Stochastic depth rate of the last block; it grows linearly from 0 at the first.
        dynamic_img_size: Take any input whose sides are multiples of 16, resampling position embeddings in forward.
        acceleration: Token gathering and migration in stage 3: 'light', 'full', or None for none. The next four replace
            parts of it; see `tokens.schedule.parse_schedule`.
        gather_window: Largest side of a window in tokens, 0 for one window.
        gather_blocks: Blocks of stage 3 with attention in windows, None for all where there are windows.
        gather_form: 'mean' or 'token', what tells a window of the others; None for 'mean'.
        migrate: Block of stage 3 -> how many tokens (int) or which share (float) of each window leave there.
        pyramid: Put the feature pyramid on the stages; the other `pyramid_` arguments are then in effect.
        pyramid_dim: Channels of its levels.
        pyramid_depth: Blocks in each of the levels at strides 8 and 4.
        pyramid_pool: How the levels at strides 32 and 64 are pooled: 'max', 'avg' or 'subsample'.
        pyramid_concat: Put the stage's own features before each level's, as the authors do for segmentation.
        pyramid_init: 'pretrained' = a checkpoint without pyramid is an error, 'random' = the pyramid then starts new.
        head_init_scale: Factor on the classifier's initial weights.
        act_layer: Activation of stages 1 and 2 and of the pyramid.
        norm_layer: Normalisation.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: A side of `img_size` is no multiple of 16, `num_heads` does not divide `embed_dim`, or one of
            `global_pool`, `pyramid_pool`, `pyramid_init`, `attn_impl`, `acceleration` is unknown, or a part of the
            acceleration cannot be.
        RuntimeError: The `attn_impl` that is asked for cannot run.
    """

    def __init__(
            self,
            img_size: int | tuple[int, int] = 224,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            embed_dim: int = 512,
            depths: tuple[int, int, int] = (3, 3, 24),
            num_heads: int = 8,
            mlp_ratio: float = 3.,
            init_values: float | None = 0.1,
            attn_impl: str = 'auto',
            drop_rate: float = 0.,
            pos_drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            attn_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            dynamic_img_size: bool = False,
            acceleration: str | None = None,
            gather_window: int | None = None,
            gather_blocks: Sequence[int] | None = None,
            gather_form: str | None = None,
            migrate: Mapping[int, int | float] | None = None,
            pyramid: bool = False,
            pyramid_dim: int = 256,
            pyramid_depth: int = 1,
            pyramid_pool: str = 'max',
            pyramid_concat: bool = False,
            pyramid_init: str = 'pretrained',
            head_init_scale: float = 0.01,
            act_layer: LayerType = 'gelu',
            norm_layer: LayerType = LayerNorm,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        norm_layer = get_norm_layer(norm_layer)
        act_layer = get_act_layer(act_layer)
        dims = (embed_dim // 4, embed_dim // 2, embed_dim)
        drop_path = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        shared = dict(
            mlp_ratio=mlp_ratio, scale_mlp=True, merge_layer=ConvPatchMerge, proj_drop=proj_drop_rate,
            norm_layer=norm_layer, **dd)
        schedule = parse_schedule(
            depths[2], acceleration, gather_window, gather_blocks, gather_form, migrate)
        patch_embed = StemPatchEmbed(
            img_size, in_chans=in_chans, embed_dim=dims[0], strict_img_size=not dynamic_img_size, **dd)
        stages = nn.Sequential(
            MlpStage(dims[0], depths[0], drop_path=drop_path[0], act_layer=act_layer, **shared),
            MlpStage(dims[1], depths[1], in_dim=dims[0], drop_path=drop_path[1], act_layer=act_layer, **shared),
            attention_stage(schedule)(
                dims[2],
                depths[2],
                num_heads,
                in_dim=dims[1],
                grid_size=patch_embed.grid_size,
                dynamic_grid_size=dynamic_img_size,
                drop_path=drop_path[2],
                pos_drop=pos_drop_rate,
                attn_drop=attn_drop_rate,
                attn_impl=attn_impl,
                init_values=init_values,
                k_bias=False,
                swiglu_mlp=True,
                act_layer=nn.SiLU,
                **shared,
            ),
        )
        feature_pyramid = None
        if pyramid:
            feature_pyramid = FeaturePyramid(
                dims,
                pyramid_dim,
                pyramid_depth,
                mlp_ratio=8 / 3,
                pre_norm=True,
                split_layer=ConvPatchSplit,
                pool=pyramid_pool,
                concat=pyramid_concat,
                act_layer=act_layer,
                norm_layer=norm_layer,
                **dd,
            )
        super().__init__(
            patch_embed,
            stages,
            dims,
            feature_pyramid,
            pyramid_init=pyramid_init,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            head_init_scale=head_init_scale,
            linear_init=('stages.2', 'head'),
            norm_layer=norm_layer,
            **dd,
        )


def _create_fast_itpn(variant: str, pretrained: bool = False, **kwargs) -> FastITPN:
    return create(FastITPN, variant, pretrained, **kwargs)


def _cfg(weights: str, num_classes: int = 0, **kwargs) -> dict[str, Any]:
    name = 'Fast-iTPN: Integrally Pre-Trained Transformer Pyramid Network with Token Migration'
    return cfg(weights, num_classes, paper_ids='arXiv:2211.12735', paper_name=name, **kwargs)


default_cfgs = generate_default_cfgs({
    'fast_itpn_tiny.mim_in1k': _cfg('fast_itpn_tiny.mim_in1k'),
    'fast_itpn_small.mim_in1k': _cfg('fast_itpn_small.mim_in1k'),
    'fast_itpn_base.mim_in1k': _cfg('fast_itpn_base.mim_in1k'),
    'fast_itpn_base.mim_in1k_ft_in21k': _cfg(
        'fast_itpn_base.mim_in1k_ft_in21k',
        num_classes=21841,
        notes=('number of classes assumed, the file has not been seen',),
    ),
    'fast_itpn_large.mim_in1k': _cfg('fast_itpn_large.mim_in1k'),
    'fast_itpn_tiny_fpn.mim_in1k': _cfg('fast_itpn_tiny.mim_in1k'),
    'fast_itpn_small_fpn.mim_in1k': _cfg('fast_itpn_small.mim_in1k'),
    'fast_itpn_base_fpn.mim_in1k': _cfg('fast_itpn_base.mim_in1k'),
    'fast_itpn_large_fpn.mim_in1k': _cfg('fast_itpn_large.mim_in1k'),
})


@register_model
def fast_itpn_tiny(pretrained: bool = False, **kwargs) -> FastITPN:
    """Fast-iTPN-T, 24 M parameters."""
    model_args = dict(embed_dim=384, depths=(1, 1, 12), num_heads=6)
    return _create_fast_itpn('fast_itpn_tiny', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def fast_itpn_small(pretrained: bool = False, **kwargs) -> FastITPN:
    """Fast-iTPN-S, 40 M parameters."""
    model_args = dict(embed_dim=384, depths=(2, 2, 20), num_heads=6)
    return _create_fast_itpn('fast_itpn_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def fast_itpn_base(pretrained: bool = False, **kwargs) -> FastITPN:
    """Fast-iTPN-B, 85 M parameters."""
    model_args = dict(embed_dim=512, depths=(3, 3, 24), num_heads=8)
    return _create_fast_itpn('fast_itpn_base', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def fast_itpn_large(pretrained: bool = False, **kwargs) -> FastITPN:
    """Fast-iTPN-L, 312 M parameters."""
    model_args = dict(embed_dim=768, depths=(2, 2, 40), num_heads=12)
    return _create_fast_itpn('fast_itpn_large', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def fast_itpn_tiny_fpn(pretrained: bool = False, **kwargs) -> FastITPN:
    """Fast-iTPN-T; its features (features_only=True) are those of the pyramid."""
    model_args = dict(embed_dim=384, depths=(1, 1, 12), num_heads=6, pyramid=kwargs.get('features_only', False))
    return _create_fast_itpn('fast_itpn_tiny_fpn', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def fast_itpn_small_fpn(pretrained: bool = False, **kwargs) -> FastITPN:
    """Fast-iTPN-S; its features (features_only=True) are those of the pyramid."""
    model_args = dict(embed_dim=384, depths=(2, 2, 20), num_heads=6, pyramid=kwargs.get('features_only', False))
    return _create_fast_itpn('fast_itpn_small_fpn', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def fast_itpn_base_fpn(pretrained: bool = False, **kwargs) -> FastITPN:
    """Fast-iTPN-B; its features (features_only=True) are those of the pyramid."""
    model_args = dict(embed_dim=512, depths=(3, 3, 24), num_heads=8, pyramid=kwargs.get('features_only', False))
    return _create_fast_itpn('fast_itpn_base_fpn', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def fast_itpn_large_fpn(pretrained: bool = False, **kwargs) -> FastITPN:
    """Fast-iTPN-L; its features (features_only=True) are those of the pyramid."""
    model_args = dict(embed_dim=768, depths=(2, 2, 40), num_heads=12, pyramid=kwargs.get('features_only', False))
    return _create_fast_itpn('fast_itpn_large_fpn', pretrained=pretrained, **dict(model_args, **kwargs))


register_model_deprecations(__name__, {
    'fast_itpn_tiny_1112_patch16_224': 'fast_itpn_tiny',
    'fast_itpn_small_2220_patch16_224': 'fast_itpn_small',
    'fast_itpn_base_3324_patch16_224': 'fast_itpn_base',
    'fast_itpn_large_2240_patch16_256': 'fast_itpn_large',
})

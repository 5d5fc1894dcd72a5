""" iTPN and HiViT

A hierarchical vision transformer of three stages: two MLP-only stages at strides 4 and 8, then a plain transformer with
relative position bias at stride 16. No class token. HiViT is the plain model; iTPN is HiViT pre-trained together with
its feature pyramid, on pixels (as MAE) or against CLIP, which adds layer scale.

Papers: 'Integrally Pre-Trained Transformer Pyramid Networks', https://arxiv.org/abs/2211.12735 (CVPR 2023);
    'HiViT: Hierarchical Vision Transformer Meets Masked Image Modeling', https://arxiv.org/abs/2205.14949 (ICLR 2023)
Upstream projects: https://github.com/sunsmarterjie/iTPN, https://github.com/zhangxiaosong18/hivit (MIT). This file is
written from the papers and from published facts about the models, not from that code; it is Apache-2.0 as the rest of
this package.

Differs from upstream:
  * features are channels-last maps (B, H, W, C) in all stages, not lists of 4 x 4 blocks; merges open a stage instead
    of standing between blocks. `checkpoint_filter_fn` converts official files.
  * the relative position bias is kept between calls in evaluation, and goes into fused attention.
  * any size whose sides are multiples of 16.
"""
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn as nn
from timm.layers import LayerNorm, LayerType, calculate_drop_path_rates, get_act_layer, get_norm_layer
from timm.models import generate_default_cfgs, register_model, register_model_deprecations, resolve_pretrained_cfg

from ..acceleration.schedule import parse_schedule
from ..acceleration.stage import attention_stage
from ..layers.patch_embed import LinearPatchMerge, LinearPatchSplit, StemPatchEmbed
from ..layers.pyramid import FeaturePyramid
from ..layers.stages import MlpStage
from .base import BaseITPN, cfg, checkpoint_filter_fn, create

__all__ = ['ITPN', 'checkpoint_filter_fn']


class ITPN(BaseITPN):
    """iTPN or HiViT backbone and classifier.

    Args:
        img_size: Image side or (height, width) in pixels, multiples of 16.
        in_chans: Image channels.
        num_classes: Classes, 0 for no classifier.
        global_pool: Pooling of the tokens: 'avg', 'max', 'avgmax', or '' for none.
        embed_dim: Width of stage 3; stages 1 and 2 have a quarter and a half of it.
        depths: Blocks of stages 1, 2 and 3.
        num_heads: Attention heads of stage 3.
        stem_mlp_ratio: Hidden channels per channel in stages 1 and 2.
        mlp_ratio: Hidden width per token width in stage 3.
        rel_pos_bias: Add a relative position bias in every block of stage 3.
        init_values: Layer scale of all stages at initialisation, 0 or None for no layer scale.
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
        act_layer: Activation.
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
            stem_mlp_ratio: float = 3.,
            mlp_ratio: float = 4.,
            rel_pos_bias: bool = True,
            init_values: float | None = None,
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
            init_values=init_values, merge_layer=LinearPatchMerge, proj_drop=proj_drop_rate, act_layer=act_layer,
            norm_layer=norm_layer, **dd)
        schedule = parse_schedule(
            depths[2], acceleration, gather_window, gather_blocks, gather_form, migrate)
        patch_embed = StemPatchEmbed(
            img_size, in_chans=in_chans, embed_dim=dims[0], strict_img_size=not dynamic_img_size,
            norm_layer=norm_layer, **dd)
        stages = nn.Sequential(
            MlpStage(dims[0], depths[0], drop_path=drop_path[0], mlp_ratio=stem_mlp_ratio, **shared),
            MlpStage(dims[1], depths[1], in_dim=dims[0], drop_path=drop_path[1], mlp_ratio=stem_mlp_ratio, **shared),
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
                rel_pos_bias=rel_pos_bias,
                k_bias=True,
                mlp_ratio=mlp_ratio,
                **shared,
            ),
        )
        feature_pyramid = None
        if pyramid:
            feature_pyramid = FeaturePyramid(
                dims,
                pyramid_dim,
                pyramid_depth,
                mlp_ratio=4.,
                align_bias=False,
                split_layer=LinearPatchSplit,
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
            linear_init=('',),
            norm_layer=norm_layer,
            **dd,
        )


# what a checkpoint needs, by the tag of its pretrained cfg
TAG_ARGS: dict[str, dict[str, Any]] = {
    'pixel_in1k': dict(init_values=0., pyramid_depth=2),
    'clip_in1k': dict(init_values=0.1, pyramid_depth=1),
}


def _create_itpn(variant: str, pretrained: bool = False, **kwargs) -> ITPN:
    source = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    return create(ITPN, variant, pretrained, **{**TAG_ARGS.get(source.tag, {}), **kwargs})


def _cfg(weights: str = '', num_classes: int = 0, **kwargs) -> dict[str, Any]:
    name = 'Integrally Pre-Trained Transformer Pyramid Networks'
    return cfg(weights, num_classes, paper_ids='arXiv:2211.12735', paper_name=name, **kwargs)


def _hivit_cfg(weights: str = '', num_classes: int = 0, **kwargs) -> dict[str, Any]:
    name = 'HiViT: Hierarchical Vision Transformer Meets Masked Image Modeling'
    return cfg(weights, num_classes, paper_ids='arXiv:2205.14949', paper_name=name, **kwargs)


# tiny and small appear in result tables, without weights
default_cfgs = generate_default_cfgs({
    'itpn_tiny': _cfg(num_classes=1000),
    'itpn_small': _cfg(num_classes=1000),
    'itpn_base.pixel_in1k': _cfg('itpn_base.pixel_in1k'),
    'itpn_base.clip_in1k': _cfg('itpn_base.clip_in1k'),
    'itpn_large.pixel_in1k': _cfg('itpn_large.pixel_in1k'),
    'itpn_large.clip_in1k': _cfg('itpn_large.clip_in1k'),
    'itpn_tiny_fpn': _cfg(num_classes=1000),
    'itpn_small_fpn': _cfg(num_classes=1000),
    'itpn_base_fpn.pixel_in1k': _cfg('itpn_base.pixel_in1k'),
    'itpn_base_fpn.clip_in1k': _cfg('itpn_base.clip_in1k'),
    'itpn_large_fpn.pixel_in1k': _cfg('itpn_large.pixel_in1k'),
    'itpn_large_fpn.clip_in1k': _cfg('itpn_large.clip_in1k'),
    'hivit_tiny': _hivit_cfg(num_classes=1000),
    'hivit_small.in1k': _hivit_cfg('hivit_small.in1k', num_classes=1000),
    'hivit_base.mae_in1k_ft_in1k': _hivit_cfg('hivit_base.mae_in1k_ft_in1k', num_classes=1000),
    'hivit_base.mae_in1k': _hivit_cfg('hivit_base.mae_in1k'),
})


@register_model
def itpn_tiny(pretrained: bool = False, **kwargs) -> ITPN:
    """iTPN-T, 19 M parameters. Its sizes are inferred from HiViT and from the parameter count in the result tables."""
    model_args = dict(embed_dim=384, depths=(2, 2, 10), num_heads=6)
    return _create_itpn('itpn_tiny', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def itpn_small(pretrained: bool = False, **kwargs) -> ITPN:
    """iTPN-S, 38 M parameters. Its sizes are inferred from HiViT and from the parameter count in the result tables."""
    model_args = dict(embed_dim=384, depths=(4, 4, 20), num_heads=6)
    return _create_itpn('itpn_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def itpn_base(pretrained: bool = False, **kwargs) -> ITPN:
    """iTPN-B, 79 M parameters."""
    model_args = dict(embed_dim=512, depths=(3, 3, 24), num_heads=8)
    return _create_itpn('itpn_base', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def itpn_large(pretrained: bool = False, **kwargs) -> ITPN:
    """iTPN-L, 288 M parameters."""
    model_args = dict(embed_dim=768, depths=(2, 2, 40), num_heads=12)
    return _create_itpn('itpn_large', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def itpn_tiny_fpn(pretrained: bool = False, **kwargs) -> ITPN:
    """iTPN-T; its features (features_only=True) are those of the pyramid."""
    model_args = dict(embed_dim=384, depths=(2, 2, 10), num_heads=6, pyramid=kwargs.get('features_only', False))
    return _create_itpn('itpn_tiny_fpn', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def itpn_small_fpn(pretrained: bool = False, **kwargs) -> ITPN:
    """iTPN-S; its features (features_only=True) are those of the pyramid."""
    model_args = dict(embed_dim=384, depths=(4, 4, 20), num_heads=6, pyramid=kwargs.get('features_only', False))
    return _create_itpn('itpn_small_fpn', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def itpn_base_fpn(pretrained: bool = False, **kwargs) -> ITPN:
    """iTPN-B; its features (features_only=True) are those of the pyramid."""
    model_args = dict(embed_dim=512, depths=(3, 3, 24), num_heads=8, pyramid=kwargs.get('features_only', False))
    return _create_itpn('itpn_base_fpn', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def itpn_large_fpn(pretrained: bool = False, **kwargs) -> ITPN:
    """iTPN-L; its features (features_only=True) are those of the pyramid."""
    model_args = dict(embed_dim=768, depths=(2, 2, 40), num_heads=12, pyramid=kwargs.get('features_only', False))
    return _create_itpn('itpn_large_fpn', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def hivit_tiny(pretrained: bool = False, **kwargs) -> ITPN:
    """HiViT-T, 19 M parameters."""
    model_args = dict(embed_dim=384, depths=(2, 2, 10), num_heads=6)
    return _create_itpn('hivit_tiny', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def hivit_small(pretrained: bool = False, **kwargs) -> ITPN:
    """HiViT-S, 38 M parameters."""
    model_args = dict(embed_dim=384, depths=(4, 4, 20), num_heads=6)
    return _create_itpn('hivit_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def hivit_base(pretrained: bool = False, **kwargs) -> ITPN:
    """HiViT-B, 66 M parameters."""
    model_args = dict(embed_dim=512, depths=(4, 4, 20), num_heads=8)
    return _create_itpn('hivit_base', pretrained=pretrained, **dict(model_args, **kwargs))


register_model_deprecations(__name__, {
    'itpn_base_3324_patch16_224': 'itpn_base',
    'itpn_large_2240_patch16_224': 'itpn_large',
    'itpn_large_2240_patch16_256': 'itpn_large',
})

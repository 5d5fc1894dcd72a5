""" Fast-iTPN, iTPN and HiViT

Hierarchical vision transformers of three stages: two MLP-only stages at strides 4 and 8, then a plain transformer at
stride 16; no class token. Pooling, norm and classifier follow stage 3. HiViT is the plain model. iTPN is HiViT
pre-trained together with a feature pyramid, on pixels (as MAE) or against CLIP, which adds layer scale. Fast-iTPN is
its successor, pre-trained against CLIP.

Papers: 'Fast-iTPN: Integrally Pre-Trained Transformer Pyramid Network with Token Migration' (TPAMI 2024) and
    'Integrally Pre-Trained Transformer Pyramid Networks' (CVPR 2023), https://arxiv.org/abs/2211.12735;
    'HiViT: Hierarchical Vision Transformer Meets Masked Image Modeling' (ICLR 2023), https://arxiv.org/abs/2205.14949
Upstream projects: https://github.com/sunsmarterjie/iTPN, https://github.com/zhangxiaosong18/hivit (MIT). This file is
written from the papers and from published facts about the models, not from that code; it is Apache-2.0 as the rest of
this package.

Differs from upstream:
  * features are channels-last maps (B, H, W, C) in all stages, so every feature extractor of timm works; merges open a
    stage instead of standing between blocks; q, k and v are one layer. `checkpoint_filter_fn` converts official files.
  * any size whose sides are multiples of 16; fused attention, also with relative position bias.
  * the pyramid of pre-training comes with the backbone (`*_fpn`).
  * token gathering and migration, which the authors describe but did not release (`acceleration=`).

Native state dict: `patch_embed`, `stages.{0,1,2}.{downsample,pos_embed,blocks.N}`, `head.{norm,fc}`, `pyramid`.
"""
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClNormMlpClassifierHead,
    LayerNorm,
    LayerType,
    Mlp,
    calculate_drop_path_rates,
    get_act_layer,
    get_norm_layer,
    to_2tuple,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_model_deprecations,
    resolve_pretrained_cfg,
)
from torch.types import Device

from ..acceleration.schedule import parse_schedule
from ..acceleration.stage import MigrationStage
from ..layers.attention import Attention
from ..layers.linear import use_onednn
from ..layers.mlp import SwiGLU
from ..layers.patch_embed import (
    ConvPatchMerge,
    ConvPatchSplit,
    LinearPatchMerge,
    LinearPatchSplit,
    StemPatchEmbed,
    token_grid,
)
from ..layers.pyramid import FeaturePyramid
from ..layers.stages import AttentionStage, MlpStage
from ..layers.tracing import holds
from ..weights.sources import drive_url, file_name, source_of
from ._timm import FeatureGetterNet, feature_take_indices, update_model_input_size
from .loading import checkpoint_filter_fn, convert_on_load, fetched, prepare_state_dict

__all__ = ['FAMILIES', 'ITPN', 'checkpoint_filter_fn']

POOL_TYPES = ('', 'avg', 'max', 'avgmax')
PYRAMID_INITS = ('pretrained', 'random')


class Family(NamedTuple):
    """What the families differ in."""
    stem_norm: bool  # the stem ends in a norm
    merge_layer: type[nn.Module]  # class of the merges that open stages 2 and 3
    scale_mlp: bool  # MLPs of the stages have a norm before their last layer
    swiglu_mlp: bool  # MLPs of stage 3 are gated
    k_bias: bool  # keys have a bias
    stem_layer_scale: bool  # stages 1 and 2 have layer scale too, where stage 3 has
    mlp_ratio: float  # default of the model's argument, and so the next two
    rel_pos_bias: bool  # relative position bias in stage 3
    init_values: float  # layer scale
    pyramid: dict[str, Any]  # arguments of its `FeaturePyramid`
    trunc_normal: tuple[str, ...]  # starts of the names of the Linear layers that are initialised by trunc normal


FAMILIES: dict[str, Family] = {
    'fast_itpn': Family(
        stem_norm=False, merge_layer=ConvPatchMerge, scale_mlp=True, swiglu_mlp=True, k_bias=False,
        stem_layer_scale=False, mlp_ratio=3., rel_pos_bias=False, init_values=0.1,
        pyramid=dict(mlp_ratio=8 / 3, pre_norm=True, align_bias=True, split_layer=ConvPatchSplit),
        trunc_normal=('stages.2', 'head')),
    'itpn': Family(
        stem_norm=True, merge_layer=LinearPatchMerge, scale_mlp=False, swiglu_mlp=False, k_bias=True,
        stem_layer_scale=True, mlp_ratio=4., rel_pos_bias=True, init_values=0.,
        pyramid=dict(mlp_ratio=4., pre_norm=False, align_bias=False, split_layer=LinearPatchSplit),
        trunc_normal=('',)),
}


class ITPN(nn.Module):
    """Backbone and classifier of Fast-iTPN, iTPN and HiViT.

    Args:
        family: Key of `FAMILIES`: 'fast_itpn', or 'itpn', which HiViT is too.
        img_size: Image side or (height, width) in pixels, multiples of 16.
        in_chans: Image channels.
        num_classes: Classes, 0 for no classifier.
        global_pool: Pooling of the tokens: 'avg', 'max', 'avgmax', or '' for none.
        embed_dim: Width of stage 3; stages 1 and 2 have a quarter and a half of it.
        depths: Blocks of stages 1, 2 and 3.
        num_heads: Attention heads of stage 3.
        stem_mlp_ratio: Hidden channels per channel in stages 1 and 2.
        mlp_ratio: Hidden width per token width in stage 3. None, here and in the next two: as in `FAMILIES`.
        rel_pos_bias: Add a relative position bias in every block of stage 3.
        init_values: Layer scale at initialisation, 0 for no layer scale.
        attn_impl: How attention is computed: 'sdpa', 'reference', or 'auto' for the first that can run.
        drop_rate: Dropout rate before the classifier.
        pos_drop_rate: Dropout rate after the position embedding.
        proj_drop_rate: Dropout rate after each attention and MLP.
        attn_drop_rate: Dropout rate of attention weights.
        drop_path_rate: Stochastic depth rate of the last block; it grows linearly from 0 at the first.
        dynamic_img_size: Take any input whose sides are multiples of 16, resampling position embeddings in forward.
        dynamic_img_pad: Take any input: sides are padded to multiples of 16 by repeating their last pixels, and
            features at stride s have ceil(side / s) positions.
        acceleration: Token gathering and migration in stage 3: 'light', 'full', or None for none. The next four
            replace parts of it; see `acceleration.schedule.parse_schedule`.
        gather_window: Largest side of a window in tokens, 0 for one window.
        gather_blocks: Blocks of stage 3 with attention in windows, None for all where there are windows.
        migrate: Block of stage 3 -> how many tokens (int) or which share (float) of each window leave there.
        carry: Bring those tokens back up to date; False = as they were when they left.
        pyramid: Put the feature pyramid on the stages; the other `pyramid_` arguments are then in effect.
        pyramid_dim: Channels of its levels.
        pyramid_depth: Blocks in each of the levels at strides 8 and 4.
        pyramid_pool: How the levels at strides 32 and 64 are pooled: 'max', 'avg' or 'subsample'.
        pyramid_concat: Join each level with the stage's own features, level first, as the authors do for segmentation.
        pyramid_init: 'pretrained' = a checkpoint without pyramid is an error, 'random' = the pyramid then starts new.
        head_init_scale: Factor on the classifier's initial weights.
        act_layer: Activation of the MLPs, except gated ones.
        norm_layer: Normalisation.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: A side of `img_size` is not a multiple of 16, `num_heads` does not divide `embed_dim`, one of
            `global_pool`, `pyramid_pool`, `pyramid_init`, `attn_impl`, `acceleration` is unknown, or a part of the
            acceleration cannot be.
        RuntimeError: The `attn_impl` that is asked for cannot run.
    """

    def __init__(
            self,
            family: str = 'fast_itpn',
            img_size: int | tuple[int, int] = 224,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            embed_dim: int = 512,
            depths: tuple[int, int, int] = (3, 3, 24),
            num_heads: int = 8,
            stem_mlp_ratio: float = 3.,
            mlp_ratio: float | None = None,
            rel_pos_bias: bool | None = None,
            init_values: float | None = None,
            attn_impl: str = 'auto',
            drop_rate: float = 0.,
            pos_drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            attn_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            dynamic_img_size: bool = False,
            dynamic_img_pad: bool = False,
            acceleration: str | None = None,
            gather_window: int | None = None,
            gather_blocks: Sequence[int] | None = None,
            migrate: Mapping[int, int | float] | None = None,
            carry: bool | None = None,
            pyramid: bool = False,
            pyramid_dim: int = 256,
            pyramid_depth: int = 1,
            pyramid_pool: str = 'max',
            pyramid_concat: bool = False,
            pyramid_init: str = 'pretrained',
            head_init_scale: float = 0.01,
            act_layer: LayerType = 'gelu',
            norm_layer: LayerType = LayerNorm,
            device: Device = None,
            dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        check_global_pool(global_pool)
        if pyramid_init not in PYRAMID_INITS:
            raise ValueError(f'pyramid_init {pyramid_init!r} is unknown, use one of {PYRAMID_INITS}')
        norm: Any = get_norm_layer(norm_layer)
        act: Any = get_act_layer(act_layer)
        differs = FAMILIES[family]
        mlp_ratio = differs.mlp_ratio if mlp_ratio is None else mlp_ratio
        rel_pos_bias = differs.rel_pos_bias if rel_pos_bias is None else rel_pos_bias
        init_values = differs.init_values if init_values is None else init_values
        dims = (embed_dim // 4, embed_dim // 2, embed_dim)
        drop_path: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        schedule = parse_schedule(depths[2], acceleration, gather_window, gather_blocks, migrate, carry)
        third: Any = AttentionStage if schedule is None else partial(MigrationStage, schedule=schedule)

        dynamic_img_size = dynamic_img_size or dynamic_img_pad

        self.family = family
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = self.num_reg_tokens = 0
        self.has_class_token = False
        self.output_fmt = 'NHWC'
        self.feature_dim = -1
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        self.pyramid_init = pyramid_init
        self.head_init_scale = head_init_scale

        self.patch_embed = StemPatchEmbed(
            img_size,
            in_chans=in_chans,
            embed_dim=dims[0],
            strict_img_size=not dynamic_img_size,
            dynamic_img_pad=dynamic_img_pad,
            norm_layer=norm if differs.stem_norm else None,
            **dd,
        )
        plain_mlp = partial(Mlp, act_layer=act)
        scale_norm = norm if differs.scale_mlp else None
        merge = partial(differs.merge_layer, norm_layer=norm, **dd)
        shared: dict[str, Any] = dict(proj_drop=proj_drop_rate, norm_layer=norm, **dd)
        stem: dict[str, Any] = dict(
            mlp_ratio=stem_mlp_ratio,
            mlp_layer=partial(plain_mlp, norm_layer=scale_norm),
            init_values=init_values if differs.stem_layer_scale else None,
            **shared,
        )
        self.stages = nn.Sequential(
            MlpStage(nn.Identity(), dims[0], drop_path[0], **stem),
            MlpStage(merge(dims[0], dims[1]), dims[1], drop_path[1], **stem),
            third(
                merge(dims[1], dims[2]),
                dims[2],
                num_heads,
                drop_path[2],
                grid_size=self.patch_embed.grid_size,
                dynamic_grid_size=dynamic_img_size,
                pos_drop=pos_drop_rate,
                attn_layer=partial(Attention, k_bias=differs.k_bias, attn_impl=attn_impl, attn_drop=attn_drop_rate),
                rel_pos_bias=rel_pos_bias,
                mlp_ratio=mlp_ratio,
                mlp_layer=partial(SwiGLU if differs.swiglu_mlp else plain_mlp, norm_layer=scale_norm),
                init_values=init_values,
                **shared,
            ),
        )
        self.pyramid = None
        self.feature_info = [
            dict(module=f'stages.{i}', num_chs=dim, reduction=4 * 2 ** i) for i, dim in enumerate(dims)]
        if pyramid:
            self.pyramid = FeaturePyramid(
                dims,
                pyramid_dim,
                pyramid_depth,
                pool=pyramid_pool,
                concat=pyramid_concat,
                mlp_layer=plain_mlp,
                norm_layer=norm,
                **differs.pyramid,
                **dd,
            )
            self.feature_info = [dict(info, module=f'pyramid.{info["module"]}') for info in self.pyramid.feature_info]
        self.head = ClNormMlpClassifierHead(
            embed_dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=norm, **dd)

        use_onednn(self)
        self.register_load_state_dict_pre_hook(convert_on_load)
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the official models: their Linear layers by trunc normal, the rest by default.

        Args:
            needs_reset: Also reset all other modules, as is needed after `to_empty()`.
        """
        if self.patch_embed.proj.weight.is_meta:
            return  # nothing is there to be filled, and PyTorch takes seconds to find that out
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and name.startswith(FAMILIES[self.family].trunc_normal):
                trunc_normal_(module.weight, std=.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif needs_reset and hasattr(module, 'reset_parameters'):
                module.reset_parameters()
        if isinstance(self.head.fc, nn.Linear):
            with torch.no_grad():
                self.head.fc.weight.mul_(self.head_init_scale)
                self.head.fc.bias.mul_(self.head_init_scale)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        tables = ('pos_embed', 'relative_position_bias_table')
        return {name for name, _ in self.named_parameters() if name.endswith(tables)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates: stem, each block and each merge, then norm, head and pyramid."""
        fine = [(r'^stages\.(\d+)\.downsample', (-1,)), (r'^stages\.(\d+)\.blocks\.(\d+)', None)]
        return dict(stem=r'^patch_embed|^stages\.2\.pos_embed', blocks=r'^stages\.(\d+)' if coarse else fine)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable
        part: Any
        for part in (*self.stages, *(self.pyramid.levels if self.pyramid is not None else ())):
            part.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put in a new classifier.

        Args:
            num_classes: Classes, 0 for no classifier.
            global_pool: New pooling, None to keep the current one.
        """
        if global_pool is not None:
            check_global_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)

    def set_input_size(
            self,
            img_size: int | tuple[int, int] | None = None,
            patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the input size; the position embeddings are resampled.

        Args:
            img_size: New side or (height, width) in pixels, multiples of 16; None for the current one.
            patch_size: Only the current one: the stages are tied to the 4 x 4 stem.

        Raises:
            ValueError: A side of `img_size` is not a multiple of 16, `patch_size` differs from the current one, or
                there would be fewer tokens than `migrate` lets leave.
        """
        if patch_size is not None and to_2tuple(patch_size) != self.patch_embed.patch_size:
            raise ValueError(f'patch_size cannot change from {self.patch_embed.patch_size} to {patch_size}')
        if img_size is not None:
            grid_size = token_grid(img_size)
            for stage in self.stages:
                if isinstance(stage, AttentionStage):
                    stage.set_grid_size(grid_size)
            self.patch_embed.set_input_size(img_size)
        update_model_input_size(self, self.patch_embed.img_size)

    def load_state_dict(
            self,
            state_dict: Mapping[str, Any],
            strict: bool = True,
            assign: bool = False,
    ) -> Any:
        """As PyTorch's, for native and official layouts, for whole pre-training files; official ones of any image size.

        Args:
            state_dict: Weights, or a checkpoint that holds them.
            strict: False = load what fits, and return the missing and unexpected keys.
            assign: Take the tensors as they are instead of copying their values.

        Raises:
            ValueError: Weights in official layout do not fit; the message says which and why.
            RuntimeError: Keys or shapes of native weights do not fit.
        """
        return super().load_state_dict(prepare_state_dict(self, state_dict, strict), strict, assign)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: int | list[int] | None = None,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Features of the stages, or of the pyramid if there is one.

        Stages are at strides 4, 8 (before the merges) and 16 (after the last block); the levels of the pyramid at
        strides 4, 8, 16, 32 and 64.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Features to return: a list (negative counts from the end), the last n for an int, all for None.
            return_prefix_tokens: Without effect: the model has no prefix tokens.
            norm: Without effect: the model has no norm before pooling.
            stop_early: Do not run stages after the last one asked for. The pyramid needs them all.
            output_fmt: 'NCHW', 'NHWC' or 'NLC'.
            intermediates_only: Leave out the output of `forward_features`.

        Returns:
            The features from fine to coarse, or (output of `forward_features`, features).

        Raises:
            ValueError: `output_fmt` is unknown.
        """
        if output_fmt not in ('NCHW', 'NHWC', 'NLC'):
            raise ValueError(f'output_fmt {output_fmt} is unknown, use NCHW, NHWC or NLC')
        take_indices, max_index = feature_take_indices(self._num_levels(), indices)
        height, width = x.shape[-2], x.shape[-1]
        x = self.patch_embed(x)
        if torch.jit.is_scripting() or not stop_early or self.pyramid is not None:  # TorchScript cannot slice modules
            stages = self.stages
        else:
            stages = self.stages[:max_index + 1]
        maps: list[torch.Tensor] = []
        for stage in stages:
            x = stage(x)
            maps.append(x)
        if self.pyramid is not None:
            intermediates = self.pyramid(maps, take_indices)
        else:
            intermediates = [maps[i] for i in sorted(take_indices)]
        if self.patch_embed.dynamic_img_pad:
            intermediates = [crop(y, height, width, 4 << i) for y, i in zip(intermediates, sorted(take_indices))]
        if output_fmt == 'NCHW':
            # (B, H, W, C) -> (B, C, H, W); .contiguous() would leave views of pooled maps, which FSDP2 warns of
            intermediates = [
                y.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format) for y in intermediates]
        elif output_fmt == 'NLC':
            intermediates = [y.flatten(1, 2) for y in intermediates]  # (B, H, W, C) -> (B, H*W, C)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def _num_levels(self) -> int:
        return len(self.stages) if self.pyramid is None else 5

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Remove what the features at `indices` do not need.

        Args:
            indices: Features to keep, as in `forward_intermediates`.
            prune_norm: Without effect: the model has no norm before pooling.
            prune_head: Remove norm and classifier; they also go when the last stage does, which they are made for.

        Returns:
            The indices, all counted from the start.
        """
        take_indices, max_index = feature_take_indices(self._num_levels(), indices)
        prune_end = False
        if self.pyramid is not None:
            self.pyramid.prune(take_indices)
        else:
            prune_end = max_index < len(self.stages) - 1
            self.stages = self.stages[:max_index + 1]
        if prune_head or prune_end:
            self.num_classes, self.global_pool = 0, ''
            if self.pyramid is None:
                self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
            self.head.reset(0, pool_type='', reset_other=True, in_features=self.num_features)
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Features of the last stage, (B, in_chans, H, W) -> (B, H/16, W/16, embed_dim)."""
        x = self.patch_embed(x)
        return self.stages(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pooling, norm, dropout and classifier, (B, H, W, C) -> (B, num_classes); before the classifier if asked."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        return self.forward_head(x)


def crop(x: torch.Tensor, height: int, width: int, stride: int) -> torch.Tensor:
    """Positions of a map (B, H, W, C) that have pixels of an image of `height` x `width`, not of its padding alone."""
    if stride < 16 and not (holds(height % 16 == 0) and holds(width % 16 == 0)):
        x = x[:, :(height + stride - 1) // stride, :(width + stride - 1) // stride]  # ONNX rounds -height / stride up
    return x


def check_global_pool(global_pool: str) -> None:
    if global_pool not in POOL_TYPES:
        raise ValueError(f'global_pool {global_pool!r} is unknown, use one of {POOL_TYPES}')


# registered name without _fpn -> family and sizes; tiny and small of iTPN appear in result tables, without weights
SIZES: dict[str, dict[str, Any]] = {
    'fast_itpn_tiny': dict(family='fast_itpn', embed_dim=384, depths=(1, 1, 12), num_heads=6),
    'fast_itpn_small': dict(family='fast_itpn', embed_dim=384, depths=(2, 2, 20), num_heads=6),
    'fast_itpn_base': dict(family='fast_itpn', embed_dim=512, depths=(3, 3, 24), num_heads=8),
    'fast_itpn_large': dict(family='fast_itpn', embed_dim=768, depths=(2, 2, 40), num_heads=12),
    'itpn_tiny': dict(family='itpn', embed_dim=384, depths=(2, 2, 10), num_heads=6),
    'itpn_small': dict(family='itpn', embed_dim=384, depths=(4, 4, 20), num_heads=6),
    'itpn_base': dict(family='itpn', embed_dim=512, depths=(3, 3, 24), num_heads=8),
    'itpn_large': dict(family='itpn', embed_dim=768, depths=(2, 2, 40), num_heads=12),
    'hivit_tiny': dict(family='itpn', embed_dim=384, depths=(2, 2, 10), num_heads=6),
    'hivit_small': dict(family='itpn', embed_dim=384, depths=(4, 4, 20), num_heads=6),
    'hivit_base': dict(family='itpn', embed_dim=512, depths=(4, 4, 20), num_heads=8),
}

# what a checkpoint needs, by the tag of its pretrained cfg
TAG_ARGS: dict[str, dict[str, Any]] = {
    'pixel_in1k': dict(init_values=0., pyramid_depth=2),
    'clip_in1k': dict(init_values=0.1, pyramid_depth=1),
}


def _create_itpn(variant: str, pretrained: bool = False, **kwargs: Any) -> ITPN:
    """Build a registered model; `_fpn` ones have the pyramid where it gives the features.

    Raises:
        ValueError: The features of a pyramid are asked for by another `feature_cls` than 'getter'.
    """
    source = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    model_args = dict(SIZES[variant.removesuffix('_fpn')], **TAG_ARGS.get(source.tag or '', {}))
    features_only = kwargs.get('features_only', False)
    if variant.endswith('_fpn'):
        model_args['pyramid'] = features_only
    if features_only and not {'img_size', 'dynamic_img_size'} & set(kwargs):
        model_args['dynamic_img_size'] = True  # decoders take images of any size
    kwargs = dict(model_args, **kwargs)
    has_pyramid = kwargs.get('pyramid', False)
    feature_cls = kwargs.get('feature_cls', 'getter')
    is_getter = feature_cls in ('getter', FeatureGetterNet)
    if has_pyramid and not is_getter:
        raise ValueError(f"feature_cls {feature_cls!r} cannot see the pyramid: leave it out, or use 'getter'.")
    if features_only and is_getter and kwargs.get('dynamic_img_size'):
        kwargs.setdefault('dynamic_img_pad', True)
    if pretrained:
        kwargs['pretrained_cfg_overlay'] = fetched(variant, **kwargs)
    return build_model_with_cfg(
        ITPN,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=5 if has_pyramid else 3, feature_cls='getter', flatten_sequential=True),
        **kwargs,
    )


PAPERS = {
    'fast_itpn': ('2211.12735', 'Fast-iTPN: Integrally Pre-Trained Transformer Pyramid Network with Token Migration'),
    'itpn': ('2211.12735', 'Integrally Pre-Trained Transformer Pyramid Networks'),
    'hivit': ('2205.14949', 'HiViT: Hierarchical Vision Transformer Meets Masked Image Modeling'),
}


def _cfg(name: str, num_classes: int = 0, **kwargs: Any) -> dict[str, Any]:
    """Default cfg, as timm calls the description of one weight file.

    Args:
        name: Of the model and its file, `arch.tag`; `arch` alone if nothing is published.
        num_classes: Of the file's classifier, 0 if it has none.
        kwargs: More of timm's `PretrainedCfg`, and what differs.
    """
    published: dict[str, Any] = {}
    if source := source_of(name):
        published = dict(
            url=(drive_url(source), file_name(name)),  # for `fetch`; timm itself does not load from a pair
            hf_hub_id=source.hub_repo or None,
            hf_hub_filename=source.hub_path or None,
            origin_url=drive_url(source),
            license=source.license,
            description=source.contents,
        )
    paper_id, paper_name = next(paper for family, paper in PAPERS.items() if name.startswith(family))
    return {
        'num_classes': num_classes,
        'input_size': (3, 224, 224),
        'pool_size': (14, 14),
        'fixed_input_size': True,
        'interpolation': 'bicubic',
        'crop_pct': 0.875,
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj',
        'classifier': 'head.fc',
        'license': 'unknown',  # of the weights
        'paper_ids': f'arXiv:{paper_id}',
        'paper_name': paper_name,
        **published,
        **kwargs,
    }


# name -> arguments of `_cfg`
CFGS: dict[str, dict[str, Any]] = {
    'fast_itpn_tiny.mim_in1k': {},
    'fast_itpn_small.mim_in1k': {},
    'fast_itpn_base.mim_in1k': {},
    'fast_itpn_base.mim_in1k_ft_in21k': dict(
        num_classes=21841, notes=('number of classes assumed, the file has not been seen',)),
    'fast_itpn_large.mim_in1k': {},
    'fast_itpn_tiny_fpn.mim_in1k': {},
    'fast_itpn_small_fpn.mim_in1k': {},
    'fast_itpn_base_fpn.mim_in1k': {},
    'fast_itpn_large_fpn.mim_in1k': {},
    'itpn_tiny': dict(num_classes=1000),
    'itpn_small': dict(num_classes=1000),
    'itpn_base.pixel_in1k': {},
    'itpn_base.clip_in1k': {},
    'itpn_large.pixel_in1k': {},
    'itpn_large.clip_in1k': {},
    'itpn_tiny_fpn': dict(num_classes=1000),
    'itpn_small_fpn': dict(num_classes=1000),
    'itpn_base_fpn.pixel_in1k': {},
    'itpn_base_fpn.clip_in1k': {},
    'itpn_large_fpn.pixel_in1k': {},
    'itpn_large_fpn.clip_in1k': {},
    'hivit_tiny': dict(num_classes=1000),
    'hivit_small.in1k': dict(num_classes=1000),
    'hivit_base.mae_in1k_ft_in1k': dict(num_classes=1000),
    'hivit_base.mae_in1k': {},
}

default_cfgs = generate_default_cfgs({name: _cfg(name, **kwargs) for name, kwargs in CFGS.items()})


@register_model
def fast_itpn_tiny(pretrained: bool = False, **kwargs: Any) -> ITPN:
    """Fast-iTPN-T, 24 M parameters."""
    return _create_itpn('fast_itpn_tiny', pretrained, **kwargs)


@register_model
def fast_itpn_small(pretrained: bool = False, **kwargs: Any) -> ITPN:
    """Fast-iTPN-S, 40 M parameters."""
    return _create_itpn('fast_itpn_small', pretrained, **kwargs)


@register_model
def fast_itpn_base(pretrained: bool = False, **kwargs: Any) -> ITPN:
    """Fast-iTPN-B, 85 M parameters."""
    return _create_itpn('fast_itpn_base', pretrained, **kwargs)


@register_model
def fast_itpn_large(pretrained: bool = False, **kwargs: Any) -> ITPN:
    """Fast-iTPN-L, 312 M parameters."""
    return _create_itpn('fast_itpn_large', pretrained, **kwargs)


@register_model
def fast_itpn_tiny_fpn(pretrained: bool = False, **kwargs: Any) -> ITPN:
    """Fast-iTPN-T; its features (features_only=True) are those of the pyramid."""
    return _create_itpn('fast_itpn_tiny_fpn', pretrained, **kwargs)


@register_model
def fast_itpn_small_fpn(pretrained: bool = False, **kwargs: Any) -> ITPN:
    """Fast-iTPN-S; its features (features_only=True) are those of the pyramid."""
    return _create_itpn('fast_itpn_small_fpn', pretrained, **kwargs)


@register_model
def fast_itpn_base_fpn(pretrained: bool = False, **kwargs: Any) -> ITPN:
    """Fast-iTPN-B; its features (features_only=True) are those of the pyramid."""
    return _create_itpn('fast_itpn_base_fpn', pretrained, **kwargs)


@register_model
def fast_itpn_large_fpn(pretrained: bool = False, **kwargs: Any) -> ITPN:
    """Fast-iTPN-L; its features (features_only=True) are those of the pyramid."""
    return _create_itpn('fast_itpn_large_fpn', pretrained, **kwargs)


@register_model
def itpn_tiny(pretrained: bool = False, **kwargs: Any) -> ITPN:
    """iTPN-T, 19 M parameters. Its sizes are inferred from HiViT and from the parameter count in the result tables."""
    return _create_itpn('itpn_tiny', pretrained, **kwargs)


@register_model
def itpn_small(pretrained: bool = False, **kwargs: Any) -> ITPN:
    """iTPN-S, 38 M parameters. Its sizes are inferred from HiViT and from the parameter count in the result tables."""
    return _create_itpn('itpn_small', pretrained, **kwargs)


@register_model
def itpn_base(pretrained: bool = False, **kwargs: Any) -> ITPN:
    """iTPN-B, 79 M parameters."""
    return _create_itpn('itpn_base', pretrained, **kwargs)


@register_model
def itpn_large(pretrained: bool = False, **kwargs: Any) -> ITPN:
    """iTPN-L, 288 M parameters."""
    return _create_itpn('itpn_large', pretrained, **kwargs)


@register_model
def itpn_tiny_fpn(pretrained: bool = False, **kwargs: Any) -> ITPN:
    """iTPN-T; its features (features_only=True) are those of the pyramid."""
    return _create_itpn('itpn_tiny_fpn', pretrained, **kwargs)


@register_model
def itpn_small_fpn(pretrained: bool = False, **kwargs: Any) -> ITPN:
    """iTPN-S; its features (features_only=True) are those of the pyramid."""
    return _create_itpn('itpn_small_fpn', pretrained, **kwargs)


@register_model
def itpn_base_fpn(pretrained: bool = False, **kwargs: Any) -> ITPN:
    """iTPN-B; its features (features_only=True) are those of the pyramid."""
    return _create_itpn('itpn_base_fpn', pretrained, **kwargs)


@register_model
def itpn_large_fpn(pretrained: bool = False, **kwargs: Any) -> ITPN:
    """iTPN-L; its features (features_only=True) are those of the pyramid."""
    return _create_itpn('itpn_large_fpn', pretrained, **kwargs)


@register_model
def hivit_tiny(pretrained: bool = False, **kwargs: Any) -> ITPN:
    """HiViT-T, 19 M parameters."""
    return _create_itpn('hivit_tiny', pretrained, **kwargs)


@register_model
def hivit_small(pretrained: bool = False, **kwargs: Any) -> ITPN:
    """HiViT-S, 38 M parameters."""
    return _create_itpn('hivit_small', pretrained, **kwargs)


@register_model
def hivit_base(pretrained: bool = False, **kwargs: Any) -> ITPN:
    """HiViT-B, 66 M parameters."""
    return _create_itpn('hivit_base', pretrained, **kwargs)


register_model_deprecations(__name__, {
    'fast_itpn_tiny_1112_patch16_224': 'fast_itpn_tiny',
    'fast_itpn_small_2220_patch16_224': 'fast_itpn_small',
    'fast_itpn_base_3324_patch16_224': 'fast_itpn_base',
    'fast_itpn_large_2240_patch16_256': 'fast_itpn_large',
    'itpn_base_3324_patch16_224': 'itpn_base',
    'itpn_large_2240_patch16_224': 'itpn_large',
    'itpn_large_2240_patch16_256': 'itpn_large',
})

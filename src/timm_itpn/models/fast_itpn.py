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

Native state dict: `patch_embed`, `stages.{0,1,2}.{downsample,pos_embed,blocks.N}`, `head.{norm,fc}`. It names layers as
timm's other hierarchical models do, and keeps in one tensor what is multiplied in one go.
"""
import logging
from contextlib import nullcontext
from typing import Any, Callable, Dict, List, Optional, Set, Tuple, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClNormMlpClassifierHead,
    DropPath,
    GluMlp,
    LayerNorm,
    LayerScale,
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
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    register_model_deprecations,
)

from ..layers import Attention, ConvPatchMerge, StemPatchEmbed, resample_pos_embed
from ..weights import fit_to_model, readable_load_errors, to_native
from ._timm import feature_take_indices, update_model_input_size

__all__ = ['FastITPN']

_logger = logging.getLogger(__name__)

POOL_TYPES = ('', 'avg', 'max', 'avgmax')


class MlpBlock(nn.Module):
    """Residual MLP with an inner norm, per position; the block of stages 1 and 2.

    Args:
        dim: Channels.
        mlp_ratio: Hidden channels per channel.
        proj_drop: Dropout rate after the MLP.
        drop_path: Stochastic depth rate.
    """

    def __init__(
            self,
            dim: int,
            mlp_ratio: float = 3.,
            proj_drop: float = 0.,
            drop_path: float = 0.,
            act_layer: Callable = nn.GELU,
            norm_layer: Callable = LayerNorm,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm = norm_layer(dim, **dd)
        self.mlp = Mlp(
            dim, int(dim * mlp_ratio), act_layer=act_layer, norm_layer=norm_layer, drop=(0., proj_drop), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop_path(self.mlp(self.norm(x)))


class AttentionBlock(nn.Module):
    """Pre-norm transformer block with SwiGLU, inner norm and layer scale; the block of stage 3. Tokens are (B, N, C).

    Args:
        dim: Token width.
        num_heads: Attention heads.
        mlp_ratio: Hidden width per token width.
        proj_drop: Dropout rate after attention and MLP.
        attn_drop: Dropout rate of attention weights.
        drop_path: Stochastic depth rate.
        init_values: Layer scale at initialisation, 0 or None for no layer scale.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            mlp_ratio: float = 3.,
            proj_drop: float = 0.,
            attn_drop: float = 0.,
            drop_path: float = 0.,
            init_values: Optional[float] = None,
            norm_layer: Callable = LayerNorm,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm1 = norm_layer(dim, **dd)
        self.attn = Attention(dim, num_heads, attn_drop=attn_drop, proj_drop=proj_drop, **dd)
        self.ls1 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = GluMlp(
            dim,
            2 * int(dim * mlp_ratio),  # gate and value side by side
            act_layer=nn.SiLU,
            norm_layer=norm_layer,
            gate_last=False,
            drop=(0., proj_drop),
            **dd,
        )
        self.ls2 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class MlpStage(nn.Module):
    """Stage 1 or 2: an optional merge, then MLP blocks. (B, H, W, C) maps.

    Args:
        dim: Channels of the stage.
        depth: Number of blocks.
        in_dim: Channels before the merge, None for a stage without merge.
        drop_path: Stochastic depth rate of each block.
        block_kwargs: For the blocks.
    """

    def __init__(
            self,
            dim: int,
            depth: int,
            in_dim: Optional[int] = None,
            drop_path: Tuple[float, ...] = (),
            norm_layer: Callable = LayerNorm,
            device=None,
            dtype=None,
            **block_kwargs,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = ConvPatchMerge(in_dim, dim, norm_layer, **dd) if in_dim is not None else nn.Identity()
        self.blocks = nn.Sequential(*[
            MlpBlock(dim, drop_path=drop_path[i], norm_layer=norm_layer, **block_kwargs, **dd) for i in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x


class AttentionStage(nn.Module):
    """Stage 3: merge, absolute position embedding, attention blocks. (B, H, W, C) maps in and out.

    Args:
        dim: Token width.
        depth: Number of blocks.
        num_heads: Attention heads.
        in_dim: Channels before the merge.
        grid_size: Tokens (height, width) that `pos_embed` is for.
        dynamic_grid_size: Resample `pos_embed` in forward when the map has another size.
        drop_path: Stochastic depth rate of each block.
        pos_drop: Dropout rate after the position embedding.
        block_kwargs: For the blocks.
    """
    dynamic_grid_size: torch.jit.Final[bool]

    def __init__(
            self,
            dim: int,
            depth: int,
            num_heads: int,
            in_dim: int,
            grid_size: Tuple[int, int],
            dynamic_grid_size: bool = False,
            drop_path: Tuple[float, ...] = (),
            pos_drop: float = 0.,
            norm_layer: Callable = LayerNorm,
            device=None,
            dtype=None,
            **block_kwargs,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.grid_size = grid_size
        self.dynamic_grid_size = dynamic_grid_size
        self.grad_checkpointing = False
        self.downsample = ConvPatchMerge(in_dim, dim, norm_layer, **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, grid_size[0] * grid_size[1], dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop)
        self.blocks = nn.Sequential(*[
            AttentionBlock(dim, num_heads, drop_path=drop_path[i], norm_layer=norm_layer, **block_kwargs, **dd)
            for i in range(depth)])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.pos_embed, std=.02)

    def set_grid_size(self, grid_size: Tuple[int, int]) -> None:
        """Resample `pos_embed` to `grid_size` tokens (height, width)."""
        if grid_size == self.grid_size:
            return
        with torch.no_grad():
            pos_embed = resample_pos_embed(self.pos_embed, new_size=list(grid_size), old_size=list(self.grid_size))
        self.pos_embed = nn.Parameter(pos_embed, requires_grad=self.pos_embed.requires_grad)
        self.grid_size = grid_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        B, H, W, C = x.shape
        pos_embed = self.pos_embed
        if self.dynamic_grid_size:
            pos_embed = resample_pos_embed(pos_embed, new_size=[H, W], old_size=self.grid_size)
        x = self.pos_drop(x.reshape(B, H * W, C) + pos_embed)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.reshape(B, H, W, C)


class FastITPN(nn.Module):
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
        drop_rate: Dropout rate before the classifier.
        pos_drop_rate: Dropout rate after the position embedding.
        proj_drop_rate: Dropout rate after each attention and MLP.
        attn_drop_rate: Dropout rate of attention weights.
        drop_path_rate: Stochastic depth rate of the last block; it grows linearly from 0 at the first.
        dynamic_img_size: Take any input whose sides are multiples of 16, resampling the position embedding in forward.
        head_init_scale: Factor on the classifier's initial weights.
        act_layer: Activation of stages 1 and 2.
        norm_layer: Normalisation.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: A side of `img_size` is no multiple of 16, or `global_pool` is unknown.
    """
    dynamic_img_size: torch.jit.Final[bool]

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]] = 224,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            embed_dim: int = 512,
            depths: Tuple[int, int, int] = (3, 3, 24),
            num_heads: int = 8,
            mlp_ratio: float = 3.,
            init_values: Optional[float] = 0.1,
            drop_rate: float = 0.,
            pos_drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            attn_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            dynamic_img_size: bool = False,
            head_init_scale: float = 0.01,
            act_layer: LayerType = 'gelu',
            norm_layer: LayerType = LayerNorm,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        check_global_pool(global_pool)
        norm_layer = get_norm_layer(norm_layer)
        act_layer = get_act_layer(act_layer)
        dims = (embed_dim // 4, embed_dim // 2, embed_dim)
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
        self.head_init_scale = head_init_scale

        self.patch_embed = StemPatchEmbed(
            img_size, in_chans=in_chans, embed_dim=dims[0], strict_img_size=not dynamic_img_size, **dd)
        drop_path = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        shared = dict(mlp_ratio=mlp_ratio, proj_drop=proj_drop_rate, norm_layer=norm_layer, **dd)
        self.stages = nn.Sequential(
            MlpStage(dims[0], depths[0], None, drop_path[0], act_layer=act_layer, **shared),
            MlpStage(dims[1], depths[1], dims[0], drop_path[1], act_layer=act_layer, **shared),
            AttentionStage(
                dims[2],
                depths[2],
                num_heads,
                in_dim=dims[1],
                grid_size=self.patch_embed.grid_size,
                dynamic_grid_size=dynamic_img_size,
                drop_path=drop_path[2],
                pos_drop=pos_drop_rate,
                attn_drop=attn_drop_rate,
                init_values=init_values,
                **shared,
            ),
        )
        self.feature_info = [
            dict(module=f'stages.{i}', num_chs=dim, reduction=4 * 2 ** i) for i, dim in enumerate(dims)]
        self.head = ClNormMlpClassifierHead(
            embed_dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=norm_layer, **dd)

        self.register_load_state_dict_pre_hook(load_official_layout)
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the official models: Linear layers of stage 3 and head trunc normal, the rest by their default.

        Stages 1 and 2 hold Linear layers where the official models hold 1x1 convolutions; both have the same default.

        Args:
            needs_reset: Also reset all other modules, as is needed after `to_empty()`.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and name.startswith(('stages.2', 'head')):
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
    def no_weight_decay(self) -> Set[str]:
        return {'stages.2.pos_embed'}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Layers for layer-wise learning rates: the stem, each block and each merge, then norm and head together."""
        if coarse:
            blocks = r'^stages\.(\d+)'
        else:
            blocks = [(r'^stages\.(\d+)\.downsample', (-1,)), (r'^stages\.(\d+)\.blocks\.(\d+)', None)]
        return dict(stem=r'^patch_embed|^stages\.2\.pos_embed', blocks=blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
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
            img_size: Optional[Union[int, Tuple[int, int]]] = None,
            patch_size: Optional[Union[int, Tuple[int, int]]] = None,
    ) -> None:
        """Change the input size; the position embedding is resampled.

        Args:
            img_size: New side or (height, width) in pixels, multiples of 16; None for the current one.
            patch_size: Only the current one: the stages are tied to the 4 x 4 stem.

        Raises:
            ValueError: A side of `img_size` is no multiple of 16, or `patch_size` differs from the current one.
        """
        if patch_size is not None and to_2tuple(patch_size) != self.patch_embed.patch_size:
            raise ValueError(f'patch_size cannot change from {self.patch_embed.patch_size} to {patch_size}')
        if img_size is not None:
            self.patch_embed.set_input_size(img_size)
            for stage in self.stages:
                if isinstance(stage, AttentionStage):
                    stage.set_grid_size(self.patch_embed.grid_size)
        update_model_input_size(self, self.patch_embed.img_size)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Features at the ends of the stages: strides 4 and 8 before the merges, stride 16 after the last block.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Stages to return: a list (negative counts from the end), the last n for an int, all for None.
            return_prefix_tokens: Without effect: the model has no prefix tokens.
            norm: Without effect: the model has no norm before pooling.
            stop_early: Do not run stages after the last one asked for.
            output_fmt: 'NCHW', 'NHWC' or 'NLC'.
            intermediates_only: Leave out the output of `forward_features`.

        Returns:
            The features in forward order, or (output of `forward_features`, features).

        Raises:
            ValueError: `output_fmt` is unknown.
        """
        if output_fmt not in ('NCHW', 'NHWC', 'NLC'):
            raise ValueError(f'output_fmt {output_fmt} is unknown, use NCHW, NHWC or NLC')
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self.patch_embed(x)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice modules
            stages = self.stages
        else:
            stages = self.stages[:max_index + 1]
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(x)
        if output_fmt == 'NCHW':
            intermediates = [y.permute(0, 3, 1, 2).contiguous() for y in intermediates]  # (B, H, W, C) -> (B, C, H, W)
        elif output_fmt == 'NLC':
            intermediates = [y.flatten(1, 2) for y in intermediates]  # (B, H, W, C) -> (B, H*W, C)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove what the features at `indices` do not need.

        Args:
            indices: Stages to keep features of, as in `forward_intermediates`.
            prune_norm: Without effect: the model has no norm before pooling.
            prune_head: Remove norm and classifier; they also go when the last stage does, which they are made for.

        Returns:
            The indices, all counted from the start.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[:max_index + 1]
        if prune_head or prune_end:
            self.num_classes, self.global_pool = 0, ''
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


def check_global_pool(global_pool: str) -> None:
    if global_pool not in POOL_TYPES:
        raise ValueError(f'global_pool {global_pool!r} is unknown, use one of {POOL_TYPES}')


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Fit a checkpoint to `model`: official or native layout, wrapped or bare, of any image size.

    Raises:
        ValueError: It is of something else, of another size, has unknown keys or lacks some; the message lists them.
    """
    state_dict = fit_to_model(to_native(state_dict), model)
    num_classes = len(state_dict.get('head.fc.bias', ()))
    cfg_classes = getattr(model, 'pretrained_cfg', {}).get('num_classes', num_classes)
    if num_classes == model.num_classes > 0 and cfg_classes not in (num_classes, -1):  # -1: replacing it is asked for
        _logger.warning(
            f'The classifier in the checkpoint is not used: it has {num_classes} classes, but pretrained_cfg says '
            f'{cfg_classes}. To keep it, pass pretrained_cfg_overlay=dict(num_classes={num_classes}).')
    return state_dict


def load_official_layout(
        model: nn.Module,
        state_dict: Dict[str, Any],
        prefix: str,
        local_metadata: Dict[str, Any],
        strict: bool,
        *collected: List[str],
) -> None:
    """Let `model.load_state_dict()` take official files, for the loaders of timm that run no filter.

    `checkpoint_path=` and `--initial-checkpoint` are such loaders. Native state dicts, or parts of one, pass untouched.
    """
    if prefix or any(key.startswith('stages.') for key in state_dict) or set(state_dict) <= set(model.state_dict()):
        return
    native = fit_to_model(to_native(state_dict), model)
    if strict and model.num_classes > 0 and 'head.fc.weight' not in native:
        raise ValueError(
            'The checkpoint has no classifier, which checkpoint_path= and --initial-checkpoint need. To start a new '
            'one, use pretrained=True with pretrained_cfg_overlay=dict(file=...), or --pretrained-path.')
    state_dict.clear()
    state_dict.update(native)


def _create_fast_itpn(variant: str, pretrained: bool = False, **kwargs) -> FastITPN:
    out_indices = kwargs.pop('out_indices', 3)
    with readable_load_errors(variant, kwargs) if pretrained else nullcontext():
        return build_model_with_cfg(
            FastITPN,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=out_indices, feature_cls='getter', flatten_sequential=True),
            **kwargs,
        )


def _cfg(drive_id: str, num_classes: int = 0, **kwargs) -> Dict[str, Any]:
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
        'paper_ids': 'arXiv:2211.12735',
        'paper_name': 'Fast-iTPN: Integrally Pre-Trained Transformer Pyramid Network with Token Migration',
        'origin_url': f'https://drive.google.com/file/d/{drive_id}',
        **kwargs,
    }


# The authors publish on Google Drive (origin_url). xche32/RELO, a tracker by others, re-hosts three of the files.
default_cfgs = generate_default_cfgs({
    'fast_itpn_tiny.mim_in1k': _cfg(
        '1Ze9RkJggxxi58Dl7sqWrf2TNOSnRK4Wi',
        hf_hub_id='xche32/RELO',
        hf_hub_filename='pretrained/itpn/fast_itpn_tiny_1600e_1k.pt',
    ),
    'fast_itpn_small.mim_in1k': _cfg('1Wvk5kQSh8fWQCUwzAp7eaVpmOi3D5_H4'),
    'fast_itpn_base.mim_in1k': _cfg(
        '1ADXPV95XpWb1ROMCih1n3AD52fGdr8C_',
        hf_hub_id='xche32/RELO',
        hf_hub_filename='pretrained/itpn/fast_itpn_base_clipl_e1600.pt',
    ),
    'fast_itpn_base.mim_in1k_ft_in21k': _cfg(
        '1ddGbBm46FiUdNs9HPSepokhuOKhEnBdV',
        num_classes=21841,
        notes=('number of classes assumed, the file has not been seen',),
    ),
    'fast_itpn_large.mim_in1k': _cfg(
        '16uybbJ23Fp7lnGNYL5I198glHGhwn_y2',
        hf_hub_id='xche32/RELO',
        hf_hub_filename='pretrained/itpn/fast_itpn_large_1600e_1k.pt',
    ),
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


register_model_deprecations(__name__, {
    'fast_itpn_tiny_1112_patch16_224': 'fast_itpn_tiny',
    'fast_itpn_small_2220_patch16_224': 'fast_itpn_small',
    'fast_itpn_base_3324_patch16_224': 'fast_itpn_base',
    'fast_itpn_large_2240_patch16_256': 'fast_itpn_large',
})

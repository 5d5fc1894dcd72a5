""" What Fast-iTPN, iTPN and HiViT share: everything but their layers

A hierarchical vision transformer of three stages: two MLP-only stages at strides 4 and 8, then a plain transformer at
stride 16; no class token. Pooling, norm and classifier follow stage 3. A feature pyramid may stand on the stages; then
it gives the features, and the classifier is as without.

Native state dict: `patch_embed`, `stages.{0,1,2}.{downsample,pos_embed,blocks.N}`, `head.{norm,fc}`, `pyramid`. Layers
have the names of timm's other hierarchical models; what is multiplied in one go is one tensor.
"""
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClNormMlpClassifierHead, LayerNorm, to_2tuple, trunc_normal_
from timm.models import PretrainedCfg, build_model_with_cfg, get_pretrained_cfg, resolve_pretrained_cfg

from ..layers.patch_embed import StemPatchEmbed, check_side_lengths
from ..layers.pyramid import FeaturePyramid
from ..layers.stages import AttentionStage
from ..weights.checkpoint import fit_to_model, to_native
from ..weights.errors import readable_load_errors
from ..weights.fetch import fetch
from ..weights.layout import PRETRAIN, PYRAMID, is_native
from ..weights.read import with_contents
from ..weights.sources import SOURCES, drive_url, file_name
from ._timm import FeatureGetterNet, feature_take_indices, update_model_input_size

__all__ = ['BaseITPN', 'cfg', 'checkpoint_filter_fn', 'create']

_logger = logging.getLogger(__name__)

POOL_TYPES = ('', 'avg', 'max', 'avgmax')
PYRAMID_INITS = ('pretrained', 'random')


class BaseITPN(nn.Module):
    """Stem, stages, head and all that timm asks of a model; the families bring the stem, the stages and the pyramid.

    Args:
        patch_embed: The stem.
        stages: Stages 1, 2 and 3.
        dims: Channels of the stages.
        pyramid: Pyramid on the stages, None for none.
        pyramid_init: 'pretrained' = a checkpoint without pyramid is an error, 'random' = the pyramid then starts new.
        in_chans: Image channels.
        num_classes: Classes, 0 for no classifier.
        global_pool: Pooling of the tokens: 'avg', 'max', 'avgmax', or '' for none.
        drop_rate: Dropout rate before the classifier.
        head_init_scale: Factor on the classifier's initial weights.
        linear_init: Starts of the names of the Linear layers that are initialised by trunc normal.
        norm_layer: Normalisation.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: `global_pool` or `pyramid_init` is unknown.
    """

    def __init__(
            self,
            patch_embed: StemPatchEmbed,
            stages: nn.Sequential,
            dims: tuple[int, int, int],
            pyramid: FeaturePyramid | None,
            pyramid_init: str,
            in_chans: int,
            num_classes: int,
            global_pool: str,
            drop_rate: float,
            head_init_scale: float,
            linear_init: tuple[str, ...],
            norm_layer: Callable = LayerNorm,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        check_global_pool(global_pool)
        if pyramid_init not in PYRAMID_INITS:
            raise ValueError(f'pyramid_init {pyramid_init!r} is unknown, use one of {PYRAMID_INITS}')
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = dims[-1]
        self.num_prefix_tokens = self.num_reg_tokens = 0
        self.has_class_token = False
        self.output_fmt = 'NHWC'
        self.feature_dim = -1
        self.dynamic_img_size = not patch_embed.strict_img_size
        self.grad_checkpointing = False
        self.pyramid_init = pyramid_init
        self.head_init_scale = head_init_scale
        self.linear_init = linear_init

        self.patch_embed = patch_embed
        self.stages = stages
        self.pyramid = pyramid
        if pyramid is None:
            self.feature_info = [
                dict(module=f'stages.{i}', num_chs=dim, reduction=4 * 2 ** i) for i, dim in enumerate(dims)]
        else:
            self.feature_info = [dict(info, module=f'pyramid.{info["module"]}') for info in pyramid.feature_info]
        self.head = ClNormMlpClassifierHead(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=norm_layer, **dd)

        self.register_load_state_dict_pre_hook(load_official_layout)
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the official models: their Linear layers by trunc normal, the rest by default.

        Args:
            needs_reset: Also reset all other modules, as is needed after `to_empty()`.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and name.startswith(self.linear_init):
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
        if self.pyramid is not None:
            for level in self.pyramid.levels:
                level.grad_checkpointing = enable

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
            ValueError: A side of `img_size` is no multiple of 16, `patch_size` differs from the current one, or fewer
                tokens would be there than `migrate` lets leave.
        """
        if patch_size is not None and to_2tuple(patch_size) != self.patch_embed.patch_size:
            raise ValueError(f'patch_size cannot change from {self.patch_embed.patch_size} to {patch_size}')
        if img_size is not None:
            stride = self.patch_embed.token_stride
            height, width = check_side_lengths(img_size, stride)
            for stage in self.stages:
                if isinstance(stage, AttentionStage):
                    stage.set_grid_size((height // stride, width // stride))
            self.patch_embed.set_input_size(img_size)
        update_model_input_size(self, self.patch_embed.img_size)

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


def check_global_pool(global_pool: str) -> None:
    if global_pool not in POOL_TYPES:
        raise ValueError(f'global_pool {global_pool!r} is unknown, use one of {POOL_TYPES}')


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Fit a checkpoint to `model`: official or native layout, wrapped or bare, of any image size.

    Raises:
        ValueError: It is of something else, of another size, has unknown keys or lacks some; the message lists them.
    """
    cfg = getattr(model, 'pretrained_cfg', {})
    if cfg.get('state_dict') is state_dict:  # of `with_contents`: the model needs no second copy of its weights
        del cfg['state_dict']
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
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        *collected: list[str],
) -> None:
    """Let `model.load_state_dict()` take official files, for the loaders of timm that run no filter.

    `checkpoint_path=` and `--initial-checkpoint` are such loaders. Native state dicts, or parts of one, pass untouched;
    but a pyramid that the model has no place for, and what only pre-training needs, is left out.
    """
    target = model.state_dict()
    surplus = any(key.startswith((PYRAMID, PRETRAIN)) and key not in target for key in state_dict)
    if prefix or (is_native(state_dict) and not surplus) or set(state_dict) <= set(target):
        return
    native = fit_to_model(to_native(state_dict), model)
    if strict and model.num_classes > 0 and 'head.fc.weight' not in native:
        raise ValueError(
            'The checkpoint has no classifier, which checkpoint_path= and --initial-checkpoint need. To start a new '
            'one, use pretrained=True with pretrained_cfg_overlay=dict(file=...), or --pretrained-path.')
    state_dict.clear()
    state_dict.update(native)


def create(model_cls: type[BaseITPN], variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a registered model.

    Args:
        model_cls: Class of the family.
        variant: Registered name.
        pretrained: Load the weights of its pretrained cfg.
        kwargs: For the class, and for timm's `build_model_with_cfg`.

    Raises:
        ValueError: The features of a pyramid are asked for by another `feature_cls` than 'getter'.
    """
    has_pyramid = kwargs.get('pyramid', False)
    out_indices = kwargs.pop('out_indices', 5 if has_pyramid else 3)
    feature_cls = kwargs.get('feature_cls', 'getter')
    if has_pyramid and feature_cls not in ('getter', FeatureGetterNet):
        raise ValueError(f"feature_cls {feature_cls!r} cannot see the pyramid: leave it out, or use 'getter'.")
    if pretrained:
        kwargs['pretrained_cfg_overlay'] = with_contents(fetched(variant, **kwargs))
    with readable_load_errors(variant, kwargs) if pretrained else nullcontext():
        return build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=out_indices, feature_cls='getter', flatten_sequential=True),
            **kwargs,
        )


def fetched(
        variant: str,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        **_: Any,
) -> dict[str, Any] | None:
    """Overlay of the pretrained cfg that names the weight file on this machine, fetched if need be.

    If the caller names a place other than the registered one, the overlay comes back as it is: timm looks there.
    """
    asked = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    name = f'{variant}.{asked.tag}' if asked.tag else variant
    registered = get_pretrained_cfg(name)
    if registered is None or places(asked) != places(registered):
        return pretrained_cfg_overlay
    path = fetch(name, cache_dir)
    return pretrained_cfg_overlay if path is None else {**(pretrained_cfg_overlay or {}), 'file': str(path)}


def places(pretrained_cfg: PretrainedCfg) -> list[Any]:
    """Where a pretrained cfg says that its weights are."""
    keys = ('url', 'file', 'hf_hub_id', 'hf_hub_filename', 'state_dict', 'source')
    values = [getattr(pretrained_cfg, key) for key in keys]
    return [tuple(value) if isinstance(value, list) else value for value in values]  # lists: a pair that was in JSON


def cfg(weights: str = '', num_classes: int = 0, **kwargs: Any) -> dict[str, Any]:
    """Default cfg, as timm calls the description of one weight file.

    Args:
        weights: Row of `SOURCES`, '' if nothing is published.
        num_classes: Of the file's classifier, 0 if it has none.
        kwargs: More of timm's `PretrainedCfg`, and what differs.
    """
    place: dict[str, Any] = {}
    if weights:
        source = SOURCES[weights]
        place = dict(
            url=(drive_url(source), file_name(weights)),  # for `fetch`; timm itself does not load from a pair
            hf_hub_id=source.hub_repo or None,
            hf_hub_filename=source.hub_path or None,
            origin_url=drive_url(source),
            license=source.license,
            description=source.contents,
        )
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
        **place,
        **kwargs,
    }

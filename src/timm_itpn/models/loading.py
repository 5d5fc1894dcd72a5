"""How weights get into a model: where they are fetched from, and what converts them."""
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from timm.models import PretrainedCfg, get_pretrained_cfg, resolve_pretrained_cfg

from ..weights.checkpoint import fit_positions, fit_to_model, leave_out, to_native, unwrap, why_no_weights
from ..weights.fetch import fetch
from ..weights.layout import is_fused, layout_of, to_current
from ..weights.read import read_contents
from ..weights.sources import check_published

_logger = logging.getLogger(__name__)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Any) -> dict[str, torch.Tensor]:
    """Fit a checkpoint to `model`: official or native layout, wrapped or bare, of any image size.

    Raises:
        ValueError: It is of something else, of another size, has unknown keys or lacks some; the message lists them.
    """
    native = fit_to_model(to_native(state_dict), model)
    cfg = getattr(model, 'pretrained_cfg', {})
    if cfg.get('state_dict') is state_dict:  # of `fetched`: the model needs no second copy of its weights
        del cfg['state_dict']
    num_classes = len(native.get('head.fc.bias', ()))
    cfg_classes = cfg.get('num_classes', num_classes)
    if num_classes == model.num_classes > 0 and cfg_classes not in (num_classes, -1):  # -1: replacing it is asked for
        _logger.warning(
            f'The classifier in the checkpoint is not used: it has {num_classes} classes, but pretrained_cfg says '
            f'{cfg_classes}. To keep it, pass pretrained_cfg_overlay=dict(num_classes={num_classes}).')
    return native


def prepare_state_dict(model: Any, state_dict: Mapping[str, Any], strict: bool) -> Mapping[str, Any]:
    """What `model.load_state_dict()` is to load, for loaders of timm that run no filter and for users.

    `checkpoint_path=` and `--initial-checkpoint` are such loaders. Native weights, or a part of them, stay as they are.

    Raises:
        ValueError: `strict`, and weights in official layout do not fit.
    """
    target = model.state_dict()
    if layout_of(state_dict) == 'native' or is_fused(target) or set(state_dict) <= set(target):
        return state_dict
    if not strict:
        try:
            return unwrap(dict(state_dict))[0]
        except ValueError:
            return state_dict  # for PyTorch to report
    native = fit_to_model(to_native(dict(state_dict)), model)
    if model.num_classes > 0 and 'head.fc.weight' not in native:
        raise ValueError(
            'The checkpoint has no classifier: load it with strict=False, or create the model with pretrained=True '
            "and pretrained_cfg_overlay=dict(file=...) (timm's scripts: --pretrained-path) for a new one.")
    return native


def convert_on_load(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Convert what lies under `prefix`: PyTorch calls this before the model, or what contains it, loads its weights.

    Official names become native ones, position embeddings fit the model's grid, and what only pre-training needs is
    left out, as is a pyramid that the model has no place for. All other keys stay, for PyTorch to report.
    """
    weights = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    layout, target = layout_of(weights), model.state_dict()
    if not layout or is_fused(target) and set(weights) <= set(target):
        return
    if is_fused(target):
        raise ValueError('The model is a fused copy: load these weights into a plain model, and fuse that.')
    converted = to_current(weights, unknown='')
    converted = leave_out(fit_positions(converted, model) if layout == 'official' else converted, target)
    loaded = {key: converted[key] for key in target if isinstance(converted.get(key), torch.Tensor)}
    if wrong := why_no_weights(loaded):
        _logger.warning(f'The weights that are loaded cannot be right: {wrong}.')
    for key in weights:
        del state_dict[prefix + key]
    state_dict.update({prefix + key: value for key, value in converted.items()})


def fetched(
        variant: str,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        **_: Any,
) -> dict[str, Any]:
    """Overlay of the pretrained cfg that has the weights of the file on this machine, fetched if need be.

    If the caller names a source other than a file or the registered one, it comes back as it is: timm looks there.
    Files are read here, since timm refuses those that hold more than tensors.

    Raises:
        RuntimeError: The weights cannot be had, or there are none.
        ValueError: The file cannot be read, holds no weights, or is not the published one of its name.
    """
    overlay: dict[str, Any] = dict(pretrained_cfg_overlay or {})
    asked = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    name = f'{variant}.{asked.tag}' if asked.tag else variant
    registered = get_pretrained_cfg(name)
    if registered is not None and _sources(asked) == _sources(registered):
        path = fetch(name, cache_dir)
        if path is None:
            raise RuntimeError(
                f'{name} has no published weights: create it without pretrained=True, or pass a local copy with '
                'pretrained_cfg_overlay=dict(file=...).')
        overlay['file'] = str(path)
    if (file := overlay.get('file')) and not overlay.get('state_dict'):
        overlay['state_dict'] = unwrap(read_contents(Path(file)).tree)[0]
        check_published(Path(file))
        if not overlay['state_dict']:
            raise ValueError(f'{file} holds no tensors.')
    return overlay


def _sources(cfg: PretrainedCfg) -> list[Any]:
    """Where a pretrained cfg says that its weights are."""
    url = list(cfg.url or ())  # a pair, which is a list if it was in JSON
    return [url, cfg.file, cfg.hf_hub_id, cfg.hf_hub_filename, cfg.state_dict, cfg.source]

"""What pre-training gives a detector, and what acceleration costs it: a small Fast-iTPN under Mask R-CNN finds digits.

All detectors see the same images in the same order. Runs are in `_FOLDER`; a study that was cut goes on with them.
"""
import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import timm
import torch
from safetensors.torch import save_file

from ..detection.arguments import add_arguments
from ..detection.task import DetectionTask, detect
from ..engine.arguments import ConfigurableParser
from ..files import replaced
from ..pretrain.pixel import Pixel
from .acceleration import SETTINGS
from .canvases import draw, load_digits, write_split
from .pretraining import STARTS, pretrain
from .results import Measurement
from .two_tasks import Training

_FOLDER = Path('output/evidence/detection')
_MODEL: dict[str, Any] = dict(embed_dim=64, depths=(1, 1, 6), num_heads=2, pyramid_dim=64)
_SIDE, _LARGE = 128, 256  # pixels, 8 x 8 and 16 x 16 tokens
_SPLITS: dict[str, dict[str, Any]] = {
    'train': dict(num=100, seed=0, side=_SIDE), 'val': dict(num=100, seed=1, side=_SIDE, test=True),
    'large_train': dict(num=150, seed=2, side=_LARGE, most=12),
    'large_val': dict(num=60, seed=3, side=_LARGE, most=12, test=True)}
_PRETRAINING = Training(300, 32, 2e-3)
_NUM_MASKED = 40  # of 64 tokens
# options of `timm-itpn detect`
_OPTIONS: dict[str, Any] = dict(
    resume='auto', figure_interval=0, layer_decay=1., eval_interval=99, warmup_updates=25)
_TRAINING: dict[str, Any] = dict(epochs=10, val_split='val')
_TUNING: dict[str, Any] = dict(epochs=1, lr=3e-4, train_split='large_train', val_split='large_val')

_STARTS = {name: STARTS[name] for name in (  # the first is accelerated
    'pixel', 'scratch', 'pixel, new pyramid', 'pixel without pyramid, new pyramid')}
_ACCELERATION: dict[str, dict[str, Any]] = {'pixel': {}} | {
    f'pixel, {name}': dict(kwargs, gather_window=8) for name, kwargs in SETTINGS.items() if kwargs}
ARMS = (*_STARTS, *list(_ACCELERATION)[1:])


def study_seed(seed: int, device: str) -> Iterator[Measurement]:
    """Pre-train, train from each start, and measure on larger images with each setting, as it is and fine-tuned.

    It is the CPU that is measured with, also where `device` trains.
    """
    _FOLDER.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(_FOLDER / '.lock'):  # the first of the seeds writes the images
        for name, options in _SPLITS.items():
            if not (_FOLDER / 'annotations' / f'instances_{name}.json').exists():
                write_split(_FOLDER, name, **options)
    for arm, (objective_type, new_pyramid) in _STARTS.items():
        weights = None if objective_type is None else str(_weights(objective_type, new_pyramid, seed, device))
        args = _arguments(f'{arm}-{seed}', seed, device, _SIDE, {}, pretrained_path=weights, **_TRAINING)
        detect(args)
        yield arm, 'trained', _scores(args, args.output / 'detector.safetensors')
    trained = _FOLDER / f'pixel-{seed}' / 'detector.safetensors'
    for arm, kwargs in _ACCELERATION.items():
        args = _arguments(
            f'{arm}-tuned-{seed}', seed, device, _LARGE, kwargs, initial_checkpoint=str(trained), **_TUNING)
        yield arm, 'larger images', _scores(args, trained)
        detect(args)
        yield arm, 'tuned to them', _scores(args, args.output / 'detector.safetensors')


def _weights(objective_type: type[Pixel], new_pyramid: bool, seed: int, device: str) -> Path:
    """File of a student after pre-training; starts share what is pre-trained alike."""
    path = _FOLDER / f'{objective_type.__name__}-{seed}.safetensors'
    if not path.exists():
        canvases = draw(*load_digits(test=False), num=2000, side=_SIDE, copies=2, seed=4)
        state = pretrain(objective_type, canvases, _PRETRAINING, seed, device, _NUM_MASKED, _MODEL)
        fresh = timm.create_model('fast_itpn_tiny', num_classes=0, pyramid=True, img_size=_SIDE, **_MODEL).state_dict()
        pyramid = {key: value for key, value in fresh.items() if key.startswith('pyramid.')}
        for file, weights in ((path.with_stem(f'{path.stem}-new'), {**state, **pyramid}), (path, state)):
            with replaced(file) as part:
                save_file(weights, part)
    return path.with_stem(f'{path.stem}-new') if new_pyramid else path


def _arguments(
        name: str, seed: int, device: str, side: int, model_kwargs: dict[str, Any], **options: Any,
) -> argparse.Namespace:
    """Arguments of a run of `timm-itpn detect`, in a folder of that name."""
    parser = ConfigurableParser()
    add_arguments(parser)
    args = parser.parse_args(['-c', 'mask_rcnn_digits'])
    vars(args).update(
        _OPTIONS, data_dir=_FOLDER, output=_FOLDER / name, seed=seed, device=device,
        model_kwargs={**_MODEL, **model_kwargs}, short_sides=[side], max_side=side, crop_short_sides=[side],
        crop_sides=[7 * side // 8, side], **options)
    return args


def _scores(args: argparse.Namespace, detector: Path) -> dict[str, float]:
    """Average precision of a detector with the settings of a run, in percent."""
    settings = dict(vars(args), initial_checkpoint=str(detector), rank=0, world_size=1, distributed=False)
    task = DetectionTask(argparse.Namespace(**settings), torch.device('cpu'))
    metrics = task.evaluate(task.model)
    return {name.replace('_', ' '): 100 * (metrics[name] or 0.) for name in ('box_AP', 'mask_AP')}

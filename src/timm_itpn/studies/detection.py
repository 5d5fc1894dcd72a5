"""What pre-training gives a detector, and what acceleration costs it: a small Fast-iTPN under Mask R-CNN finds digits.

All detectors see the same images in the same order. Runs are in `_FOLDER`; a study that was cut goes on with them.
"""
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from ..bench.machine import this_machine
from ..checks import require
from ..detection.arguments import add_arguments
from ..detection.task import DetectionTask, detect
from ..engine.arguments import ConfigurableParser
from ..files import replaced
from ..pretrain.pixel import Pixel
from .acceleration import SETTINGS
from .canvases import draw, load_digits
from .coco_digits import write_split
from .pretraining import PixelOfStage3, pretrain
from .results import Row, measure_seeds
from .two_tasks import Training

__all__ = ['ARMS', 'study']

_FOLDER = Path('output/evidence/detection')
_MODEL: dict[str, Any] = dict(embed_dim=64, depths=(1, 1, 6), num_heads=2, pyramid_dim=64)
_SIDE, _LARGE = 128, 256  # pixels, 8 x 8 and 16 x 16 tokens
_SPLITS: dict[str, dict[str, Any]] = {
    'train': dict(num=100, seed=0, side=_SIDE), 'val': dict(num=100, seed=1, side=_SIDE, test=True),
    'large_train': dict(num=150, seed=2, side=_LARGE, most=12),
    'large_val': dict(num=60, seed=3, side=_LARGE, most=12, test=True)}
_PRETRAINING = Training(300, 32, 2e-3)
_NUM_MASKED = 40  # of 64 tokens
_OPTIONS = (
    '-c', 'mask_rcnn_digits', '--resume', 'auto', '--figure-interval', '0', '--layer-decay', '1', '--eval-interval',
    '99', '--warmup-updates', '25')
_TRAINING = ('--epochs', '10')
_TUNING = ('--epochs', '1', '--lr', '3e-4', '--train-split', 'large_train')

# what is pre-trained, and whether the detector gets a new pyramid; the first is accelerated
_STARTS: dict[str, tuple[type[Pixel] | None, bool]] = {
    'pixel': (Pixel, False), 'scratch': (None, True), 'pixel, new pyramid': (Pixel, True),
    'pixel without pyramid, new pyramid': (PixelOfStage3, True)}
_ACCELERATION: dict[str, dict[str, Any]] = {'pixel': {}} | {
    f'pixel, {name}': dict(kwargs, gather_window=8) for name, kwargs in SETTINGS.items() if kwargs}
ARMS = (*_STARTS, *list(_ACCELERATION)[1:])


def study(seeds: Sequence[int], done: Collection[int] = (), device: str = 'cpu') -> Iterator[Row]:
    """Pre-train, train, measure on larger images, as it is and fine-tuned; as many seeds at a time as there are cores.

    Args:
        seeds: Of weights, order and masks; the data are the same for all.
        done: Seeds that are not wanted.
        device: 'cpu' or 'cuda', which trains; it is the CPU that is measured with.

    Yields:
        A row for each seed, and start or acceleration.
    """
    require('the experiment', 'detection', 'pycocotools', 'filelock')
    for name, options in _SPLITS.items():
        if not (_FOLDER / 'annotations' / f'instances_{name}.json').exists():
            write_split(_FOLDER, name, **options)
    yield from measure_seeds(_study_seed, seeds, done, device)


def _study_seed(seed: int, device: str) -> list[Row]:
    rows = []
    for arm, (objective_type, new_pyramid) in _STARTS.items():
        weights = () if objective_type is None else (
            '--pretrained-path', str(_weights(objective_type, new_pyramid, seed, device)))
        run = _arguments(f'{arm}-{seed}', seed, device, _SIDE, {}, *_TRAINING, *weights)
        detect(_parsed(run))
        rows.append(_row(arm, 'trained', seed, run))
    trained = ('--initial-checkpoint', str(_FOLDER / f'pixel-{seed}' / 'detector.safetensors'))
    for arm, kwargs in _ACCELERATION.items():
        run = _arguments(f'{arm}-tuned-{seed}', seed, device, _LARGE, kwargs, *_TUNING, *trained)
        rows.append(_row(arm, 'larger images', seed, run, trained))
        detect(_parsed(run))
        rows.append(_row(arm, 'tuned to them', seed, run))
    return rows


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
        name: str, seed: int, device: str, side: int, model_kwargs: dict[str, Any], *more: str) -> list[str]:
    """Command line of a run, which ends with the folder."""
    kwargs = [f'{key}={value!r}' for key, value in {**_MODEL, **model_kwargs}.items()]
    val = 'val' if side == _SIDE else 'large_val'
    return ['--data-dir', str(_FOLDER), '--val-split', val, '--seed', str(seed), '--device', device, '--model-kwargs', *kwargs,
            '--short-sides', str(side), '--max-side', str(side), '--crop-short-sides', str(side),
            '--crop-sides', str(7 * side // 8), str(side), *_OPTIONS, *more, '--output', str(_FOLDER / name)]


def _parsed(argv: Sequence[str]) -> Any:
    parser = ConfigurableParser()
    add_arguments(parser)
    return parser.parse_args(argv)


def _row(arm: str, measured: str, seed: int, run: list[str], checkpoint: Sequence[str] = ()) -> Row:
    """Measure what a run has trained, or a checkpoint with its settings."""
    checkpoint = checkpoint or ('--initial-checkpoint', f'{run[-1]}/detector.safetensors')
    args = _parsed([*run, *checkpoint])
    vars(args).update(rank=0, world_size=1, distributed=False)
    task = DetectionTask(args, torch.device('cpu'))
    metrics = task.evaluate(task.model)
    scores = {name.replace('_', ' '): 100 * (metrics[name] or 0.) for name in ('box_AP', 'mask_AP')}
    return Row(arm, measured, seed, scores, this_machine(args.device))

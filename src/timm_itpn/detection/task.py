"""Training of Mask R-CNN as a task of the engine: data, detector, average precision, and the files at the end."""
import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial
from itertools import islice
from math import gcd
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save_file
from torchvision.models.detection import MaskRCNN
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, save_image

from ..engine import loop
from ..engine.data import Replacing, seeded
from ..engine.task import Batch, Losses, Task, creating
from ..files import replaced
from ..weights.read import read_contents
from .data import MAX_SIDE, SIDES, CocoDataset, eval_transforms, train_transforms
from .evaluate import MASK_THRESHOLD, NAMES, evaluate
from .model import PREFIX, compute_losses, mask_rcnn, param_groups

NORMS: dict[str, Callable[[int], nn.Module]] = {  # of the box head, by --head-norm
    'batch': nn.BatchNorm2d, 'group': lambda channels: nn.GroupNorm(gcd(channels, 32), channels)}
SPLITS = {'train': ('train2017', 'train'), 'val': ('val2017', 'val')}
SHORT_SIDE = 480  # of most images of COCO
NUM_DRAWN = 4  # images
DRAWN_SCORE = 0.5  # the least of a prediction


def detect(args: argparse.Namespace) -> dict[str, Any]:
    """Train, go on with a run, or measure a checkpoint, as the arguments of the command say; see `engine.loop`."""
    if args.evaluate:
        return dict(loop.evaluate(args, DetectionTask, args.evaluate))
    return loop.train(args, DetectionTask)


class DetectionTask(Task):
    """One step of a detector.

    Args:
        args: Arguments of the command, see `arguments.add_arguments`; sizes that are not given are filled in.
        device: Where the detector is.

    Raises:
        ValueError: An argument or the data are not usable, or weights cannot be had.
    """
    COMPILED = 'backbone'  # the heads' shapes never repeat
    FREE = ('val_split', 'eval_interval', 'evaluate')
    CHANGEABLE = ('pretrained_path', 'initial_checkpoint')

    def __init__(self, args: argparse.Namespace, device: torch.device):
        val_set = _open(args, 'val')
        train_set = val_set if args.evaluate else _open(args, 'train')
        if train_set.category_ids != val_set.category_ids:
            raise ValueError(f'The ids of the categories are {train_set.category_ids} for training, but '
                             f'{val_set.category_ids} for validation: name splits that have the same.')
        _complete(args, train_set)
        if not args.evaluate:
            train_set.transforms = train_transforms(
                args.short_sides, args.max_side, args.crop_short_sides, args.crop_sides, args.hflip)
        model = _create_detector(args, train_set.num_classes)
        if args.distributed and device.type == 'cuda':
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        super().__init__(args, device, model, train_set, train_set.fingerprint)
        self.val_set = val_set
        decay = args.layer_decay or (0.9 if args.pretrained or args.pretrained_path else 1.)
        self.optimizer_kwargs = dict(
            param_group_fn=partial(param_groups, weight_decay=args.weight_decay, layer_decay=decay))

    def forward(self, input: Any, target: Any = None) -> Losses:
        """Losses of a batch of `CocoDataset.collate`, which has the targets."""
        with self.autocast():
            return compute_losses(self.trainable_module, **input)

    def evaluate(self, model: nn.Module, epoch: int | None = None) -> dict[str, float | None]:
        """Average precision, see `evaluate.average_precision`; None for each where none is due."""
        args = self.args
        if epoch is not None and (epoch + 1) % args.eval_interval and epoch + 1 < args.epochs:
            return dict.fromkeys(NAMES)
        with self.autocast():
            return evaluate(model, self.val_set, self.device, args.workers, args.rank, args.world_size)

    @torch.inference_mode()
    def draw(self, path: Path, batch: Batch) -> None:
        """Draw the first images for validation that can be read: what is there above, what is predicted below."""
        self.model.eval()
        samples = Replacing(self.val_set, num_others=0)
        readable = filter(None, (samples[index][0] for index in range(len(samples))))
        pictures: list[torch.Tensor] = []
        for image, target in islice(readable, NUM_DRAWN):
            output = self.model([image.to(self.device)])[0]
            output['masks'] = output['masks'][:, 0]
            found = {key: value[output['scores'] >= DRAWN_SCORE].cpu() for key, value in output.items()}
            pictures += [_picture(image, objects, self.val_set) for objects in (target, found)]
        padded = self.model.transform.batch_images(pictures, size_divisible=1)
        with replaced(path) as part:
            save_image(torch.cat((padded[::2], padded[1::2])) / 255, part, nrow=len(padded) // 2, pad_value=1.)

    def export(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> dict[str, Path]:
        backbone = {key.removeprefix(PREFIX): value for key, value in state_dict.items() if key.startswith(PREFIX)}
        files = {}
        for name, weights in (('detector', state_dict), ('backbone', backbone)):
            files[name] = folder / f'{name}.safetensors'
            with replaced(files[name]) as part:
                save_file(weights, part, metadata=self.metadata())
        return files


def _open(args: argparse.Namespace, split: str) -> CocoDataset:
    """Images of a split: DIR/annotations/instances_NAME.json and DIR/NAME."""
    given = getattr(args, f'{split}_split')
    names = [given] if given else SPLITS[split]
    files = [args.data_dir / 'annotations' / f'instances_{name}.json' for name in names] if args.data_dir else []
    for name, file in zip(names, files):
        if file.exists():
            return CocoDataset(file, args.data_dir / name, eval_transforms())
    where = f': there is no {" or ".join(map(str, files))}' if files else ''
    raise ValueError(f'--data-dir must be a folder in the layout of COCO{where}. Name another, or another split with '
                     f'--{split}-split.')


def _complete(args: argparse.Namespace, dataset: CocoDataset) -> None:
    """Choose the sides that are not given."""
    short_side = statistics.median(min(row['height'], row['width']) for row in dataset.coco.imgs.values())
    scale = min(1., short_side / SHORT_SIDE)
    args.max_side = args.max_side or round(scale * MAX_SIDE)
    for key, sides in SIDES.items():
        setattr(args, key, getattr(args, key) or [round(scale * side) for side in sides])
    if args.crop_sides[0] > args.crop_sides[1]:
        raise ValueError(f'--crop-sides {args.crop_sides}: the smaller one comes first.')


def _create_detector(args: argparse.Namespace, num_classes: int) -> MaskRCNN:
    with creating(f'The detector with {args.model}'):
        backbone = dict(drop_path_rate=args.drop_path, **args.model_kwargs)
        if not args.evaluate:
            backbone['pretrained'] = args.pretrained or bool(args.pretrained_path)
            if args.pretrained_path:
                backbone['pretrained_cfg_overlay'] = dict(file=args.pretrained_path)
        model = mask_rcnn(
            args.model, num_classes, backbone, args.head_dim, NORMS[args.head_norm], min_size=max(args.short_sides),
            max_size=args.max_side, box_batch_size_per_image=args.box_samples,
            rpn_post_nms_top_n_train=args.num_proposals, rpn_post_nms_top_n_test=args.num_proposals,
            **args.detector_kwargs)
        model.backbone.body.model.set_grad_checkpointing(args.grad_checkpointing)
        if args.initial_checkpoint and not args.evaluate:
            tree = read_contents(Path(args.initial_checkpoint)).tree
            model.load_state_dict(tree.get('model', tree))
        _try_out(copy.deepcopy(model))
    return model


def _try_out(model: MaskRCNN) -> None:
    """Run a detector on an image, in training and in evaluation: most arguments are looked at only there."""
    image, masks = torch.full((3, 64, 64), 0.5), torch.ones(1, 64, 64, dtype=torch.uint8)
    target = dict(boxes=torch.tensor([[8., 8., 56., 56.]]), labels=torch.tensor([1]), masks=masks)
    model.transform.min_size = (64,)
    with seeded(0), torch.no_grad():
        loss = compute_losses(model.train(), [image], [target])['loss']
        model.eval()([image])
    if not loss.isfinite():
        raise ArithmeticError(f'its loss is {loss.item()}')


def _picture(image: torch.Tensor, objects: dict[str, torch.Tensor], dataset: CocoDataset) -> torch.Tensor:
    """An image with outlines, names and scores of objects, uint8."""
    picture = (255 * image).round().to(torch.uint8)
    if len(objects['boxes']) == 0:  # torchvision warns
        return picture
    labels = [dataset.coco.cats[dataset.category_ids[label - 1]]['name'] for label in objects['labels'].tolist()]
    if 'scores' in objects:
        labels = [f'{label} {score:.2f}' for label, score in zip(labels, objects['scores'].tolist())]
    picture = draw_segmentation_masks(picture, objects['masks'] >= MASK_THRESHOLD, alpha=0.5)
    return draw_bounding_boxes(picture, objects['boxes'], labels, width=1)

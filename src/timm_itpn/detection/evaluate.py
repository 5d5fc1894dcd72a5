"""Average precision of boxes and masks, as COCO defines it, by pycocotools."""
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torchvision.ops import box_convert
from tqdm import tqdm

from ..engine.data import Replacing, load
from .data import CocoDataset

MASK_THRESHOLD = 0.5
METRICS = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl')  # the first of pycocotools' `stats`
NAMES = tuple(f'{kind}_{metric}' for kind in ('box', 'mask') for metric in METRICS)

Result = dict[str, Any]


def evaluate(
        model: nn.Module, dataset: CocoDataset, device: torch.device, workers: int = 0, rank: int = 0,
        world_size: int = 1,
) -> dict[str, float | None]:
    """Average precision of a detector on a data set; images that cannot be read are left out, counted and named.

    Every process has to call it. Images go one by one, so their number does not matter.

    Args:
        model: Detector; it is left in the mode it was in.
        dataset: With `data.eval_transforms`.
        device: Of the model.
        workers: Processes that read, 0 for none.
        rank: Of the process.
        world_size: Number of processes.

    Raises:
        RuntimeError: No image can be read.
    """
    batches = load(Replacing(dataset, num_others=0), sampler=range(rank, len(dataset), world_size), num_workers=workers)
    results: list[Result] = []
    image_ids, unreadable = [], []
    training = model.training
    model.eval()
    for batch in tqdm(batches, 'evaluation', leave=False, mininterval=1, file=sys.stderr, disable=rank > 0):
        if names := batch.pop('unreadable')[0]:
            unreadable += names
            continue
        results += predict(model, batch, dataset.category_ids, device)
        image_ids.append(int(batch['targets'][0]['image_id']))
    model.train(training)
    found: list[Any] = [(results, image_ids, unreadable)]
    if world_size > 1:
        found = [None] * world_size
        dist.all_gather_object(found, (results, image_ids, unreadable))
    results, image_ids, unreadable = (sum(lists, []) for lists in zip(*found))
    if not image_ids:
        raise RuntimeError(f'No image for the evaluation can be read, such as {unreadable[0]}: mend them.')
    if unreadable and rank == 0:
        tqdm.write(f'{len(unreadable)} of {len(dataset)} images are left out of the evaluation because they cannot be '
                   f'read, such as {unreadable[0]}', file=sys.stderr)
    return average_precision(dataset, results, image_ids) if rank == 0 else dict.fromkeys(NAMES)


@torch.inference_mode()
def predict(
        model: nn.Module, batch: dict[str, Any], category_ids: list[int], device: torch.device) -> list[Result]:
    """Predictions in COCO's format of results, which JSON can hold.

    Args:
        model: Detector in evaluation mode.
        batch: Of `CocoDataset.collate`.
        category_ids: Of the labels from 1.
        device: Of the model.
    """
    from pycocotools.mask import encode

    results = []
    for output, target in zip(model([image.to(device) for image in batch['images']]), batch['targets']):
        boxes = box_convert(output['boxes'].float().cpu(), 'xyxy', 'xywh')
        masks = (output['masks'][:, 0] >= MASK_THRESHOLD).byte().permute(1, 2, 0)  # (N, 1, H, W) -> (H, W, N)
        codes = encode(np.asfortranarray(masks.cpu().numpy()))
        results += [
            dict(image_id=int(target['image_id']), category_id=category_ids[label - 1], score=score, bbox=box,
                 segmentation={'size': list(code['size']), 'counts': code['counts'].decode('ascii')})
            for label, score, box, code in zip(
                output['labels'].tolist(), output['scores'].tolist(), boxes.tolist(), codes)]
    return results


def average_precision(
        dataset: CocoDataset, results: list[Result], image_ids: Sequence[int] | None = None,
) -> dict[str, float | None]:
    """Average precision of predictions.

    Args:
        dataset: What was predicted.
        results: Of `predict`, from all processes.
        image_ids: Of the images that count, None for all that the data set has.

    Returns:
        'box_AP', 'box_AP50', 'box_AP75', 'box_APs', 'box_APm', 'box_APl' and the same of masks, 0 to 1; None where the
        data set has no object, or none of that size.
    """
    from pycocotools.cocoeval import COCOeval

    precisions: dict[str, float | None] = {}
    for name, kind, other in (('box', 'bbox', 'segmentation'), ('mask', 'segm', 'bbox')):
        # without the other, sizes of predictions are those of what is measured
        chosen = [{key: value for key, value in result.items() if key != other} for result in results]
        with redirect_stdout(StringIO()):  # pycocotools prints
            predicted = dataset.coco.loadRes(chosen) if chosen else _nothing(dataset.coco)
            evaluation = COCOeval(dataset.coco, predicted, kind)
            evaluation.params.imgIds = dataset.ids if image_ids is None else image_ids
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        for metric, value in zip(METRICS, evaluation.stats.tolist()):
            precisions[f'{name}_{metric}'] = value if value >= 0 else None  # -1: nothing to find
    return precisions


def _nothing(coco: Any) -> Any:
    """No predictions, which pycocotools cannot load."""
    empty = type(coco)()
    empty.dataset = {**coco.dataset, 'annotations': []}
    empty.createIndex()
    return empty

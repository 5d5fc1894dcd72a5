"""Average precision of boxes and masks, as COCO defines it, by pycocotools."""
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from .coco import quiet
from .data import CocoDataset

__all__ = ['average_precision', 'evaluate', 'predict']

MASK_THRESHOLD = 0.5
METRICS = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl')  # the first of pycocotools' `stats`

Result = dict[str, Any]


def evaluate(
        model: nn.Module, batches: Iterable[Any], dataset: CocoDataset, device: torch.device,
) -> dict[str, float | None]:
    """Average precision of a detector on a data set; see `predict` and `average_precision`."""
    return average_precision(dataset, predict(model, batches, dataset.category_ids, device))


@torch.inference_mode()
def predict(
        model: nn.Module, batches: Iterable[Any], category_ids: list[int], device: torch.device,
) -> list[Result]:
    """Predictions in COCO's format of results, which JSON can hold.

    Args:
        model: Detector; it is left in the mode it was in.
        batches: Lists of images and of targets, which have 'image_id'.
        category_ids: Of the labels from 1.
        device: Of the model.
    """
    training = model.training
    model.eval()
    results = []
    for images, targets in batches:
        for output, target in zip(model([image.to(device) for image in images]), targets):
            results += _results(output, int(target['image_id']), category_ids)
    model.train(training)
    return results


def _results(output: dict[str, torch.Tensor], image_id: int, category_ids: list[int]) -> list[Result]:
    """The predictions of one image."""
    from pycocotools.mask import encode

    boxes = output['boxes'].float().cpu()
    boxes[:, 2:] -= boxes[:, :2]  # left, top, right, bottom -> left, top, width, height
    masks = (output['masks'][:, 0] >= MASK_THRESHOLD).byte().permute(1, 2, 0)  # (N, 1, H, W) -> (H, W, N)
    codes = encode(np.asfortranarray(masks.cpu().numpy()))
    return [
        dict(image_id=image_id, category_id=category_ids[label - 1], score=score, bbox=box,
             segmentation={'size': list(code['size']), 'counts': code['counts'].decode('ascii')})
        for label, score, box, code in zip(
            output['labels'].tolist(), output['scores'].tolist(), boxes.tolist(), codes)]


def average_precision(dataset: CocoDataset, results: list[Result]) -> dict[str, float | None]:
    """Average precision of predictions.

    Args:
        dataset: What was predicted; images that it skips are not counted.
        results: Of `predict`, from all processes.

    Returns:
        'box_AP', 'box_AP50', 'box_AP75', 'box_APs', 'box_APm', 'box_APl' and the same of masks, 0 to 1; None where the
        data set has no object, or none of that size.
    """
    from pycocotools.cocoeval import COCOeval

    precisions: dict[str, float | None] = {}
    for name, kind, other in (('box', 'bbox', 'segmentation'), ('mask', 'segm', 'bbox')):
        # without the other, sizes of predictions are those of what is measured
        chosen = [{key: value for key, value in result.items() if key != other} for result in results]
        with quiet():
            predicted = dataset.coco.loadRes(chosen) if chosen else _nothing(dataset.coco)
            evaluation = COCOeval(dataset.coco, predicted, kind)
            evaluation.params.imgIds = dataset.ids
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

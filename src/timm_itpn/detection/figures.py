"""Pictures of what a detector finds, beside what is there."""
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, save_image

from ..files import replaced
from .data import CocoDataset
from .evaluate import MASK_THRESHOLD

__all__ = ['draw']

SCORE_THRESHOLD = 0.5


@torch.inference_mode()
def draw(path: Path, model: nn.Module, dataset: CocoDataset, num_images: int, device: torch.device) -> None:
    """Write a PNG: one column for each of the first images that can be read; what is there above, predictions below.

    Args:
        path: Of the PNG.
        model: Detector; it is left in the mode it was in.
        dataset: With `data.eval_transforms`.
        num_images: Number of columns.
        device: Of the model.
    """
    names = [dataset.coco.cats[number]['name'] for number in dataset.category_ids]
    training = model.training
    model.eval()
    pictures: list[torch.Tensor] = []
    for index in range(len(dataset)):
        try:
            image, target = dataset[index]
        except Exception:  # of a file that cannot be read, which the evaluation names
            continue
        output = model([image.to(device)])[0]
        output['masks'] = output['masks'][:, 0]
        found = {key: value[output['scores'] >= SCORE_THRESHOLD].cpu() for key, value in output.items()}
        pictures += [_picture(image, each, names) for each in (target, found)]
        if len(pictures) == 2 * num_images:
            break
    model.train(training)
    height, width = (max(picture.shape[i] for picture in pictures) for i in (1, 2))
    padded = [F.pad(picture, (0, width - picture.shape[2], 0, height - picture.shape[1])) for picture in pictures]
    with replaced(path) as part:
        save_image(torch.stack(padded[::2] + padded[1::2]) / 255, part, nrow=len(padded) // 2, pad_value=1.)


def _picture(image: torch.Tensor, objects: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    """An image with outlines, names and scores of objects, uint8."""
    picture = (255 * image).round().to(torch.uint8)
    if len(objects['boxes']) == 0:  # torchvision warns
        return picture
    labels = [names[label - 1] for label in objects['labels'].tolist()]
    if 'scores' in objects:
        labels = [f'{label} {score:.2f}' for label, score in zip(labels, objects['scores'].tolist())]
    picture = draw_segmentation_masks(picture, objects['masks'] >= MASK_THRESHOLD, alpha=0.5)
    return draw_bounding_boxes(picture, objects['boxes'], labels, width=1)

"""Handwritten digits drawn onto the photographs, as files in the layout of COCO: boxes and masks of real data."""
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .canvases import NUM_CLASSES, ground, integer, load_digits, with_digit

__all__ = ['write_split']

_SIZES = (32, 65)  # of a drawing, in pixels, the last excluded
_CATEGORIES = [dict(id=1 + digit, name=str(digit)) for digit in range(NUM_CLASSES)]


def write_split(
        folder: Path, name: str, num: int, seed: int, side: int = 128, most: int = 4, test: bool = False) -> None:
    """Write square images of digits that do not overlap, and their annotations.

    Args:
        folder: What --data-dir names.
        name: Of the split.
        num: Number of images.
        seed: Of all that is random.
        side: Of the images, in pixels.
        most: Digits on an image; there are one to so many.
        test: Draw those that are held out.
    """
    from pycocotools.mask import encode, toBbox

    digits, labels = load_digits(test)
    generator = torch.Generator().manual_seed(seed)
    images, annotations = [], list[dict[str, Any]]()
    for path in (folder / name, folder / 'annotations'):
        path.mkdir(parents=True, exist_ok=True)
    for number in range(1, num + 1):
        image, _ = ground(side, generator)
        taken = torch.zeros(side, side, dtype=torch.bool)
        for _ in range(integer(1, most + 1, generator)):
            which = integer(0, len(labels), generator)
            with_it, ink = with_digit(image, digits[which], _SIZES, generator)
            code = encode(np.asfortranarray((ink[0] > 0.5).numpy().astype(np.uint8)))
            left, top, width, height = map(int, toBbox(code))
            box = slice(top, top + height), slice(left, left + width)
            if taken[box].any():
                continue
            image, taken[box] = with_it, True
            annotations.append(dict(
                id=len(annotations) + 1, image_id=number, category_id=1 + int(labels[which]),
                bbox=[left, top, width, height],
                segmentation=dict(size=[side, side], counts=code['counts'].decode())))
        file = f'{number:05d}.png'
        Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(folder / name / file)
        images.append(dict(id=number, file_name=file, height=side, width=side))
    content = json.dumps(dict(images=images, annotations=annotations, categories=_CATEGORIES))
    (folder / 'annotations' / f'instances_{name}.json').write_text(content)

"""Handwritten digits drawn onto textured canvases: small real data with many tokens, most of which say little.

`draw` makes them in memory, with a label for each token, `write_split` as files in the layout of COCO, with boxes and
masks. Digits are scikit-learn's. The texture is a dimmed crop of one of its two photographs on one side of a random
line, of the other on the other side; a plain ground has one dim colour. Digits are bright, of random position, size and
colour.
"""
import json
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

NUM_CLASSES = 10
NUM_TEXTURES = 2

_SIZES = (32, 65)  # of a drawing, in pixels, the last excluded
_DIM = 0.6  # the brightest ground, of 0..1
_INK = 0.2  # share of a token's pixels that are ink from which on it belongs to the digit
_TEST_SHARE = 5  # every fifth digit is for testing


class Canvases(NamedTuple):
    """Canvases and what is on them.

    Token labels are, for each square of `stride` pixels, which photograph it is of (0 on plain ground), or 2 + digit.
    """
    images: torch.Tensor  # (M, 3, side, side), uint8
    labels: torch.Tensor  # (M,), the digit
    token_labels: torch.Tensor  # (M, side / stride, side / stride)


def load_digits(test: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits (M, 8, 8) in 0..1 and their classes (M,): every fifth for testing, the others for training."""
    from sklearn.datasets import load_digits as load

    data = load()
    chosen = (torch.arange(len(data.target)) % _TEST_SHARE == 0) == test
    return torch.tensor(data.images, dtype=torch.float32)[chosen] / 16, torch.tensor(data.target)[chosen]


def draw(
        digits: torch.Tensor,
        labels: torch.Tensor,
        num: int,
        side: int,
        copies: int,
        seed: int,
        sizes: tuple[int, int] = _SIZES,
        stride: int = 16,
        plain: bool = False,
) -> Canvases:
    """Draw canvases; the digits take turns.

    Args:
        digits: (M, 8, 8) in 0..1.
        labels: (M,).
        num: Number of canvases.
        side: Of a canvas, in pixels, a multiple of `stride`, at least as long as a drawing.
        copies: Drawings of its digit on a canvas.
        seed: Of all that is random.
        sizes: Of a drawing, in pixels, the last excluded.
        stride: Pixels per token label, along a side.
        plain: Draw on a colour, not on photographs.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.empty(num, 3, side, side, dtype=torch.uint8)
    token_labels = torch.empty(num, side // stride, side // stride, dtype=torch.int64)
    which = torch.arange(num) % len(labels)
    for i in range(num):
        if plain:
            first = torch.ones(1, side, side, dtype=torch.bool)
            canvas = (_DIM * torch.rand(3, 1, 1, generator=generator)).expand(3, side, side)
        else:
            canvas, first = _ground(side, generator)
        marks = torch.zeros(1, side, side)
        for _ in range(copies):
            canvas, ink = _with_digit(canvas, digits[which[i]], sizes, generator)
            marks = torch.maximum(marks, ink)
        images[i] = (canvas * 255).round().to(torch.uint8)
        share = F.avg_pool2d((marks > 0.5).float(), stride)[0]
        second = (F.avg_pool2d(first.float(), stride)[0] < 0.5).long()
        token_labels[i] = torch.where(share < _INK, second, 2 + labels[which[i]])
    return Canvases(images, labels[which], token_labels)


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
        image, _ = _ground(side, generator)
        taken = torch.zeros(side, side, dtype=torch.bool)
        for _ in range(_integer(1, most + 1, generator)):
            which = _integer(0, len(labels), generator)
            with_it, ink = _with_digit(image, digits[which], _SIZES, generator)
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
    categories = [dict(id=1 + digit, name=str(digit)) for digit in range(NUM_CLASSES)]
    content = json.dumps(dict(images=images, annotations=annotations, categories=categories))
    (folder / 'annotations' / f'instances_{name}.json').write_text(content)


def _ground(side: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops of both photographs, (3, side, side) in 0..1, and where the first one is, (1, side, side).

    It is on one side of a random line, which passes near the middle.
    """
    angle = 2 * math.pi * torch.rand((), generator=generator)
    offset = (torch.rand((), generator=generator) - 0.5) * 0.6
    along = torch.linspace(-1, 1, side)
    first = (along * angle.cos() + along[:, None] * angle.sin() > offset)[None]
    textures = [_texture(photograph, side, generator) for photograph in _photographs()]
    return torch.where(first, textures[0], textures[1]), first


@cache
def _photographs() -> list[torch.Tensor]:
    from sklearn.datasets import load_sample_images

    return [torch.tensor(image).permute(2, 0, 1) / 255 for image in load_sample_images().images]


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    """A random integer, low <= i < high."""
    return int(torch.randint(low, high, (), generator=generator))


def _texture(photograph: torch.Tensor, side: int, generator: torch.Generator) -> torch.Tensor:
    """A square crop of a photograph, perhaps mirrored, dimmed, (3, side, side)."""
    _, height, width = photograph.shape
    size = _integer(height // 3, height, generator)
    top, left = _integer(0, height - size, generator), _integer(0, width - size, generator)
    crop = photograph[:, top:top + size, left:left + size]
    if _integer(0, 2, generator):
        crop = crop.flip(2)
    crop = F.interpolate(crop[None], (side, side), mode='bilinear', antialias=True)[0]
    return crop * (_DIM / 2 + _DIM / 2 * torch.rand((), generator=generator))


def _with_digit(
        canvas: torch.Tensor, digit: torch.Tensor, sizes: tuple[int, int], generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A canvas (3, side, side) with a digit (8, 8) drawn on it at a random position, and its ink, (1, side, side)."""
    side, size = canvas.shape[2], _integer(*sizes, generator)
    top, left = _integer(0, side - size + 1, generator), _integer(0, side - size + 1, generator)
    drawn = F.interpolate(digit[None, None], (size, size), mode='bicubic')[0].clamp(0, 1)
    ink = F.pad(drawn, (left, side - left - size, top, side - top - size))
    colour = 1 - 0.3 * torch.rand(3, 1, 1, generator=generator)
    return canvas + ink * (colour - canvas), ink

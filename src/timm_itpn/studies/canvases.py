"""Handwritten digits drawn onto textured canvases: small real data with many tokens, most of which say little.

Digits are scikit-learn's. The texture is a dimmed part of one of its two photographs on one side of a random line, of
the other on the other; a plain ground has one dim colour. Digits are bright, each of random place, size and colour.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

__all__ = ['NUM_CLASSES', 'NUM_TEXTURES', 'Canvases', 'draw', 'load_digits']

NUM_CLASSES = 10
NUM_TEXTURES = 2
SIZES = (32, 65)  # of a drawing, in pixels, the last excluded
DIM = 0.6  # the brightest ground, of 0..1
INK = 0.2  # share of a token's pixels that are ink, from which on it belongs to the digit
TEST_SHARE = 5  # every fifth digit is for testing


class Canvases(NamedTuple):
    """Canvases and what is on them.

    Attributes:
        images: (M, 3, side, side), uint8.
        labels: (M,), the digit.
        token_labels: (M, side / stride, side / stride), for each square of `stride` pixels which photograph it is of
            (0 on plain ground), or 2 + digit.
    """
    images: torch.Tensor
    labels: torch.Tensor
    token_labels: torch.Tensor


def load_digits(test: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits (M, 8, 8) in 0..1 and their classes (M,): every fifth for testing, the others for training."""
    from sklearn.datasets import load_digits as load

    data = load()
    chosen = (torch.arange(len(data.target)) % TEST_SHARE == 0) == test
    return torch.tensor(data.images, dtype=torch.float32)[chosen] / 16, torch.tensor(data.target)[chosen]


def draw(
        digits: torch.Tensor,
        labels: torch.Tensor,
        num: int,
        side: int,
        copies: int,
        seed: int,
        sizes: tuple[int, int] = SIZES,
        stride: int = 16,
        plain: bool = False,
) -> Canvases:
    """Draw canvases; the digits take turns.

    Args:
        digits: (M, 8, 8) in 0..1.
        labels: (M,).
        num: How many canvases.
        side: Of a canvas, in pixels, a multiple of `stride`, at least as long as a drawing.
        copies: Drawings of its digit on a canvas.
        seed: Of all that is random.
        sizes: Of a drawing, in pixels, the last excluded.
        stride: Pixels per token label, along a side.
        plain: Draw on a colour, not on photographs.
    """
    from sklearn.datasets import load_sample_images

    photographs = tuple(torch.tensor(image).permute(2, 0, 1) / 255 for image in load_sample_images().images)
    generator = torch.Generator().manual_seed(seed)
    images = torch.empty(num, 3, side, side, dtype=torch.uint8)
    token_labels = torch.empty(num, side // stride, side // stride, dtype=torch.int64)
    which = torch.arange(num) % len(labels)
    for i in range(num):
        if plain:
            first = torch.ones(1, side, side, dtype=torch.bool)
            canvas = (DIM * torch.rand(3, 1, 1, generator=generator)).expand(3, side, side)
        else:
            first = boundary(side, generator)  # True where the first photograph is
            ground = [texture(photograph, side, generator) for photograph in photographs]
            canvas = torch.where(first, ground[0], ground[1])
        marks = torch.zeros(1, side, side)
        for _ in range(copies):
            mask = place(digits[which[i]], side, sizes, generator)
            colour = 1 - 0.3 * torch.rand(3, 1, 1, generator=generator)
            canvas = canvas + mask * (colour - canvas)
            marks = torch.maximum(marks, mask)
        images[i] = (canvas * 255).round().to(torch.uint8)
        ink = F.avg_pool2d((marks > 0.5).float(), stride)[0]
        second = (F.avg_pool2d(first.float(), stride)[0] < 0.5).long()
        token_labels[i] = torch.where(ink < INK, second, 2 + labels[which[i]])
    return Canvases(images, labels[which], token_labels)


def integer(low: int, high: int, generator: torch.Generator) -> int:
    """A random integer, low <= i < high."""
    return int(torch.randint(low, high, (), generator=generator))


def boundary(side: int, generator: torch.Generator) -> torch.Tensor:
    """True on one side of a random line, (1, side, side); it passes near the middle."""
    angle = 2 * math.pi * torch.rand((), generator=generator)
    offset = (torch.rand((), generator=generator) - 0.5) * 0.6
    along = torch.linspace(-1, 1, side)
    return (along * angle.cos() + along[:, None] * angle.sin() > offset)[None]


def texture(photograph: torch.Tensor, side: int, generator: torch.Generator) -> torch.Tensor:
    """A square part of a photograph, perhaps mirrored, dimmed, (3, side, side)."""
    _, height, width = photograph.shape
    size = integer(height // 3, height, generator)
    top, left = integer(0, height - size, generator), integer(0, width - size, generator)
    part = photograph[:, top:top + size, left:left + size]
    if integer(0, 2, generator):
        part = part.flip(2)
    part = F.interpolate(part[None], (side, side), mode='bilinear', antialias=True)[0]
    return part * (DIM / 2 + DIM / 2 * torch.rand((), generator=generator))


def place(digit: torch.Tensor, side: int, sizes: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Ink of a digit (8, 8) at a random place of an empty canvas, (1, side, side) in 0..1."""
    size = integer(*sizes, generator)
    top, left = integer(0, side - size + 1, generator), integer(0, side - size + 1, generator)
    ink = torch.zeros(1, side, side)
    drawn = F.interpolate(digit[None, None], (size, size), mode='bicubic')[0].clamp(0, 1)
    ink[:, top:top + size, left:left + size] = drawn
    return ink

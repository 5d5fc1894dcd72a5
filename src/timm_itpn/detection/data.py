"""Images and instances in COCO's format for torchvision's detectors, and the authors' augmentation."""
import logging
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..checks import printable
from ..engine.data import to_rgb
from .coco import read_coco

__all__ = ['MAX_SIDE', 'SIDES', 'CocoDataset', 'eval_transforms', 'train_transforms']

# the authors', for `train_transforms`
SIDES: dict[str, Sequence[int]] = dict(
    short_sides=range(480, 801, 32), crop_short_sides=(400, 500, 600), crop_sides=(384, 600))
MAX_SIDE = 1333

_logger = logging.getLogger(__name__)

Sample = tuple[torch.Tensor, dict[str, torch.Tensor]]


class CocoDataset(Dataset):
    """Images and their instances; crowds are left to the evaluation.

    Ids of categories may have gaps: label i is `category_ids[i - 1]`, label 0 is the background.

    Args:
        annotations: JSON file in COCO's format.
        image_dir: Folder of the images that it names. Those that are not there are skipped, which the log says.
        transforms: `train_transforms()` or `eval_transforms()`.

    Attributes:
        coco: The annotations, as pycocotools' `COCO`.
        ids: Of the images, in the order of the samples.
        category_ids: In the order of the labels.
        num_classes: Categories and the background.
        fingerprint: What tells these data from others.

    Raises:
        RuntimeError: An image is not of the size that the file says. Pillow raises anything if it cannot be read.
        ValueError: The file cannot be used, or no image is there.
    """

    def __init__(self, annotations: Path, image_dir: Path, transforms: Callable):
        self.coco = read_coco(annotations)
        self.image_dir = image_dir
        self.transforms = transforms
        self.category_ids = sorted(self.coco.cats)
        self.num_classes = 1 + len(self.category_ids)
        self.labels = {category: i for i, category in enumerate(self.category_ids, start=1)}
        self.ids = [number for number in sorted(self.coco.imgs) if self._path(number).is_file()]
        missing = sorted(self.coco.imgs.keys() - set(self.ids))
        if not self.ids:
            raise ValueError(f'{image_dir} has none of the images of {annotations}: name the folder that they are in.')
        if missing:
            _logger.warning(
                f'Skipped {len(missing)} of {len(self.coco.imgs)} images, which are missing, such as '
                f'{printable(str(self._path(missing[0])))}.')
        checksum = zlib.crc32(repr(self.ids).encode(), zlib.crc32(annotations.read_bytes()))
        self.fingerprint = f'{len(self.ids)} images ({checksum:08x})'
        num_empty = sum(not self.coco.imgToAnns.get(number) for number in self.ids)
        if num_empty:
            _logger.info(f'{num_empty} of {len(self.ids)} images have no annotation: they are all background.')

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        number = self.ids[index]
        image, target = self.transforms(self._image(number), self._target(number))
        target['seed'] = torch.randint(2 ** 62, ())  # of the boxes that the detector samples
        return image, target

    @staticmethod
    def collate(samples: Sequence[Sample]) -> dict[str, list[Any]]:
        """A batch: 'images' and 'targets', as torchvision's detectors take them."""
        images, targets = zip(*samples)
        return dict(images=list(images), targets=list(targets))

    def name(self, index: int) -> str:
        """File of a sample."""
        return self.coco.imgs[self.ids[index]]['file_name']

    def _path(self, number: int) -> Path:
        return self.image_dir / self.coco.imgs[number]['file_name']

    def _image(self, number: int) -> tv_tensors.Image:
        path, row = self._path(number), self.coco.imgs[number]
        with Image.open(path) as file:
            image = to_rgb(file)
        if image.size != (row['width'], row['height']):
            raise RuntimeError(
                f'{path} has {image.width} x {image.height} pixels, but its annotations are for {row["width"]} x '
                f'{row["height"]}.')
        return tv_tensors.Image(v2.functional.pil_to_tensor(image))

    def _target(self, number: int) -> dict[str, torch.Tensor]:
        size = self.coco.imgs[number]['height'], self.coco.imgs[number]['width']
        rows = [row for row in self.coco.imgToAnns.get(number, ()) if not row['iscrowd']]
        boxes = torch.tensor([row['bbox'] for row in rows], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # left, top, width, height -> left, top, right, bottom
        masks = [torch.from_numpy(self.coco.annToMask(row)) for row in rows]
        return dict(
            boxes=tv_tensors.BoundingBoxes(boxes, format='XYXY', canvas_size=size),
            masks=tv_tensors.Mask(torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8)),
            labels=torch.tensor([self.labels[row['category_id']] for row in rows], dtype=torch.int64),
            image_id=torch.tensor(number),
        )


def train_transforms(
        short_sides: Sequence[int], max_side: int, crop_short_sides: Sequence[int], crop_sides: Sequence[int],
        hflip: float = 0.5) -> v2.Compose:
    """The augmentation: a flip, then a resize, in half of the cases of a random crop.

    Args:
        short_sides: Of the images, in pixels; one is drawn.
        max_side: Largest long side.
        crop_short_sides: Of the images before they are cropped.
        crop_sides: Smallest and largest side of the crop.
        hflip: Probability of a horizontal flip.
    """
    resize = v2.RandomShortestSize(list(short_sides), max_side)
    crop = partial(_random_crop, smallest=crop_sides[0], largest=crop_sides[1])
    cropped = v2.Compose([v2.RandomShortestSize(list(crop_short_sides)), crop, resize])
    return v2.Compose([
        v2.RandomHorizontalFlip(hflip),
        v2.RandomChoice([resize, cropped]),
        v2.ClampBoundingBoxes(),
        v2.SanitizeBoundingBoxes(),
        eval_transforms(),
    ])


def eval_transforms() -> v2.Compose:
    """Images in 0 to 1, as plain tensors; the detector resizes them."""
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


def _random_crop(image: tv_tensors.Image, target: dict[str, torch.Tensor], smallest: int, largest: int) -> Any:
    """Crop at a random position, to two random sides in pixels; images with shorter sides keep them."""
    sides = [int(torch.randint(min(side, smallest), min(side, largest) + 1, ())) for side in image.shape[-2:]]
    return v2.RandomCrop(sides)(image, target)

"""Images and instances in COCO's format for torchvision's detectors, and the authors' augmentation.

Annotation files are read and checked once, before anything is trained or measured with them.
"""
import json
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2

from ..checks import are_numbers, printable, read_text, require
from ..engine.data import to_rgb

# the authors', for `train_transforms`
SIDES: dict[str, Sequence[int]] = dict(
    short_sides=range(480, 801, 32), crop_short_sides=(400, 500, 600), crop_sides=(384, 600))
MAX_SIDE = 1333

_logger = logging.getLogger(__name__)

Sample = tuple[torch.Tensor, dict[str, torch.Tensor]]
Row = dict[str, Any]

TABLES: dict[str, dict[str, type]] = {  # what is needed of each entry
    'images': dict(id=int, file_name=str, height=int, width=int),
    'categories': dict(id=int, name=str),
    'annotations': dict(id=int, image_id=int, category_id=int, bbox=list),
}


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
        path, row = self._path(number), self.coco.imgs[number]
        with Image.open(path) as file:
            image = to_rgb(file)
        size = row['height'], row['width']
        if image.size != size[::-1]:
            raise RuntimeError(
                f'{path} has {image.width} x {image.height} pixels, but its annotations are for {row["width"]} x '
                f'{row["height"]}.')
        objects = [each for each in self.coco.imgToAnns.get(number, ()) if not each['iscrowd']]
        boxes = torch.tensor([each['bbox'] for each in objects], dtype=torch.float32).reshape(-1, 4)
        boxes = box_convert(boxes, 'xywh', 'xyxy')
        masks = [torch.from_numpy(self.coco.annToMask(each)) for each in objects]
        target = dict(
            boxes=tv_tensors.BoundingBoxes(boxes, format='XYXY', canvas_size=size),
            masks=tv_tensors.Mask(torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8)),
            labels=torch.tensor([self.labels[each['category_id']] for each in objects], dtype=torch.int64),
            image_id=torch.tensor(number),
        )
        seen, target = self.transforms(tv_tensors.Image(v2.functional.pil_to_tensor(image)), target)
        target['seed'] = torch.randint(2 ** 62, ())  # of the boxes that the detector samples
        return seen, target

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


def read_coco(path: Path) -> Any:
    """Read an annotation file.

    Annotations that cannot be used, such as boxes without area, are left out, and the log says how many and why.
    `area` and `iscrowd`, which pycocotools needs, are filled in where they are missing.

    Returns:
        pycocotools' `COCO`.

    Raises:
        RuntimeError: pycocotools is not installed.
        ValueError: It is not a file in COCO's format, or names images or categories that it does not have.
    """
    require('COCO data', 'detection', 'pycocotools')
    from pycocotools.coco import COCO
    from pycocotools.mask import area

    try:
        data = json.loads(read_text(path))
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(f'{path} cannot be read as JSON: {error}.') from error
    by_id = {table: _by_id(data, table, path) for table in TABLES}
    kept, left = [], Counter[str]()
    for number, row in by_id['annotations'].items():
        for key, table in (('image_id', 'images'), ('category_id', 'categories')):
            if row[key] not in by_id[table]:
                raise ValueError(f'{path}: annotation {number} has the {key} {row[key]}, which is not in {table!r}.')
        problem = _problem(row, by_id['images'][row['image_id']])
        if problem:
            left[problem] += 1
        else:
            kept.append({**row, 'iscrowd': int(bool(row.get('iscrowd')))})
    if left:
        _logger.warning(
            f'Left out {left.total()} of {len(by_id["annotations"])} annotations of {path}: '
            f'{", ".join(f"{count} with {problem}" for problem, count in left.items())}.')
    coco = COCO()
    coco.dataset = {**data, 'annotations': kept}
    with redirect_stdout(StringIO()):  # it prints
        coco.createIndex()
    for row in kept:
        if not isinstance(row.get('area'), (int, float)):
            row['area'] = float(area(coco.annToRLE(row)))
    return coco


def _by_id(data: Any, table: str, path: Path) -> dict[int, Row]:
    """The entries of a table by their ids."""
    rows = data.get(table) if isinstance(data, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f'{path} is not in COCO format: it has no list {table!r}.')
    if not rows and table != 'annotations':
        raise ValueError(f'{path} has no {table}: its list {table!r} is empty.')
    by_id: dict[int, Row] = {}
    for i, row in enumerate(rows):
        wanted = TABLES[table].items()
        wrong = [key for key, kind in wanted if not isinstance(row, dict) or not isinstance(row.get(key), kind)]
        if wrong:
            raise ValueError(f'{path}: {wrong[0]!r} of entry {i} of {table!r} is missing or of a wrong type.')
        if row['id'] in by_id:
            raise ValueError(f'{path}: two entries of {table!r} have the id {row["id"]}.')
        by_id[row['id']] = row
    return by_id


def _problem(row: Row, image: Row) -> str:
    """Why an annotation cannot be used, '' if it can."""
    if len(row['bbox']) != 4 or not are_numbers(row['bbox']):
        return 'a box that is not four numbers'
    left, top, width, height = row['bbox']
    right, bottom = min(left + width, image['width']), min(top + height, image['height'])
    if width <= 0 or height <= 0:
        return 'a box of no area'
    if right <= max(left, 0) or bottom <= max(top, 0):
        return 'a box outside of the image'
    return '' if _is_segmentation(row.get('segmentation'), image) else 'no usable segmentation'


def _is_segmentation(value: Any, image: Row) -> bool:
    """Whether a value is polygons of at least three points, or a run-length code of the image's size."""
    from pycocotools.mask import area

    if isinstance(value, list):
        return bool(value) and all(
            isinstance(each, list) and len(each) >= 6 and len(each) % 2 == 0 and are_numbers(each) for each in value)
    if not isinstance(value, dict) or value.get('size') != [image['height'], image['width']]:
        return False
    counts = value.get('counts')
    if isinstance(counts, list):
        return are_numbers(counts) and sum(counts) == image['height'] * image['width']
    return isinstance(counts, str) and 0 < area(value) <= image['height'] * image['width']

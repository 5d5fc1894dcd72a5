"""Samples of pre-training: one crop of an image for student and teacher, and a mask."""
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from PIL import Image
from timm.data import create_dataset, get_img_extensions, is_img_extension, str_to_interp_mode
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from ..checks import check_regular_file
from ..engine.data import Replacing, seeded, to_rgb

Sample = dict[str, Any]
NUM_SIZES = 1000  # files whose sizes tell data apart
TRAIN = ('train', 'training')  # names of a folder, one as good as the other
MIN_BLOCK = 16  # tokens of a block
MIN_ASPECT = 0.3  # of a block, height by width or width by height
MAX_TRIES = 10  # of one block


def random_masking(grid_size: tuple[int, int], num_masked: int, generator: torch.Generator) -> torch.Tensor:
    """Mask random tokens; arguments and result as of `block_masking`."""
    height, width = grid_size
    masked = torch.zeros(height * width, dtype=torch.bool)
    masked[torch.randperm(height * width, generator=generator)[:num_masked]] = True
    return masked.reshape(height, width)


def block_masking(grid_size: tuple[int, int], num_masked: int, generator: torch.Generator) -> torch.Tensor:
    """Mask rectangles of at least 16 tokens, of aspect 0.3 to 1 / 0.3, until there are enough.

    Rectangles may overlap. Single random tokens make up the number where no further rectangle fits, so it is exact.

    Args:
        grid_size: Tokens (height, width).
        num_masked: How many.
        generator: Of everything random.

    Returns:
        (height, width), bool, True where masked.
    """
    height, width = grid_size
    masked = torch.zeros(height, width, dtype=torch.bool)
    left = num_masked
    while left > 0 and (added := _add_block(masked, left, generator)):
        left -= added
    if left > 0:
        free = (~masked).flatten().nonzero()[:, 0]
        masked.view(-1)[free[torch.randperm(len(free), generator=generator)[:left]]] = True
    return masked


def _add_block(masked: torch.Tensor, left: int, generator: torch.Generator) -> int:
    """Mask one rectangle with at most `left` tokens that are not masked yet; return their number."""
    height, width = masked.shape
    for _ in range(MAX_TRIES):
        draws = torch.rand(4, generator=generator).tolist()
        area = MIN_BLOCK + draws[0] * max(0, left - MIN_BLOCK)
        aspect = math.exp((2 * draws[1] - 1) * -math.log(MIN_ASPECT))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < rows <= height and 0 < columns <= width):
            continue
        top, start = int(draws[2] * (height - rows + 1)), int(draws[3] * (width - columns + 1))
        block = masked[top:top + rows, start:start + columns]
        added = rows * columns - int(block.sum())
        if 0 < added <= left:
            block.fill_(True)
            return added
    return 0


MASKINGS: dict[str, Callable] = {'block': block_masking, 'random': random_masking}


class View(NamedTuple):
    """How student or teacher sees a crop: size (height, width) in pixels, mean and standard deviation per channel."""
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class SampleMaker(NamedTuple):
    """Crops an image at random for student and teacher, and adds a random mask; draws from torch's generator."""
    views: tuple[View, ...]  # of the student and, if there is one, of the teacher
    grid_size: tuple[int, int]  # tokens (height, width) of the student
    masking: Callable  # value of `MASKINGS`
    num_masked: int  # tokens that are masked
    scale: tuple[float, float] = (0.2, 1.)  # smallest and largest share of the image's area that is cropped
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # smallest and largest width by height of the crop
    hflip: float = 0.5  # probability of a horizontal flip
    interpolation: str = 'bicubic'  # as timm names it

    def __call__(self, image: Image.Image) -> Sample:
        """'images' (3, H, W), for a teacher 'teacher_images', and 'masked' (h, w)."""
        box = RandomResizedCrop.get_params(image, list(self.scale), list(self.ratio))
        flip = bool(torch.rand(()) < self.hflip)
        masked = self.masking(self.grid_size, self.num_masked, torch.default_generator)
        sample = {'masked': masked}
        for name, view in zip(('images', 'teacher_images'), self.views):
            crop = TF.resized_crop(image, *box, list(view.size), str_to_interp_mode(self.interpolation))
            pixels = TF.to_tensor(TF.hflip(crop) if flip else crop)
            sample[name] = TF.normalize(pixels, list(view.mean), list(view.std))
        return sample


@dataclass(eq=False)
class Samples(Dataset):
    """Samples of data that have indices; whatever reading them raises is passed on."""
    source: Any  # gives a PIL image, or the open file of one, first of each item
    make: SampleMaker  # makes the samples

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        found = self.source[index][0]
        return self.make(to_rgb(found if isinstance(found, Image.Image) else Image.open(found)))

    def name(self, index: int) -> str:
        return getattr(self.source, 'filename', 'image {}'.format)(index)


class StreamedSamples(IterableDataset, Replacing):
    """Samples, in an epoch, of a dataset of timm that can only be read from its start, as WebDataset's.

    Everything random follows from seed, epoch, process, worker and count. The last whole image, or a black one, takes
    the place of one that cannot be read.
    """

    def __init__(self, dataset: Any, make: SampleMaker, seed: int, rank: int, workers: int):
        super().__init__(dataset, seed)
        dataset.set_loader_cfg(num_workers=max(1, workers))
        self.make = make
        self.rank = rank

    def __iter__(self) -> Iterator[tuple[Sample, list[str]]]:
        """Samples, each with the name of the image that it takes the place of, if it does."""
        worker = getattr(get_worker_info(), 'id', 0)
        self.samples.set_epoch(self.epoch)
        count, whole = 0, Image.new('RGB', (1, 1))
        try:
            for count, (image, _) in enumerate(self.samples, 1):
                names: list[str] = []
                try:
                    whole = to_rgb(image)
                except Exception as error:  # as in `Replacing`
                    names = [f'image {count} of worker {worker} ({type(error).__name__})']
                with seeded(self.seed, self.epoch, self.rank, worker, count - 1):
                    sample = self.make(whole)
                yield sample, names
        except Exception as error:  # whatever reads the stream raises
            raise RuntimeError(f'The data cannot be read on after {count} images: {error}.') from error


class Folder(ReaderImageFolder):
    """As timm's reader, without classes, and with each folder once however many links lead to it."""

    def __init__(self, root: Path):
        self.root = str(root)
        self.samples: list[tuple[str, int]] = []
        seen = set()
        for folder, folders, files in os.walk(root, followlinks=True, onerror=lambda e: print(e, file=sys.stderr)):
            if (real := os.path.realpath(folder)) in seen:
                folders.clear()
                continue
            seen.add(real)
            self.samples += [(os.path.join(folder, name), -1) for name in files
                             if is_img_extension(os.path.splitext(name)[1].lower())]
            folders.sort()
        self.samples.sort()

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        check_regular_file(Path(self.samples[index][0]))
        return super().__getitem__(index)


def fingerprint(dataset: Any) -> str:
    """What tells data apart: the number of images, and of folders and tar files their names and sizes.

    Args:
        dataset: From `open_dataset`.
    """
    known: list[Any] = []
    if isinstance(dataset, Folder):
        paths = [path.removeprefix(dataset.root) for path, _ in dataset.samples]
        some = [dataset.root + path for path in paths[::len(paths) // NUM_SIZES + 1]]
        known = [paths, [os.path.getsize(path) for path in some if os.path.isfile(path)]]
    elif isinstance(dataset, ReaderImageInTar):
        known = [(info.name, info.size) for info, _, _ in dataset.samples]
    return f'{len(dataset)} images ({zlib.crc32(repr(known).encode()):08x})'


def open_dataset(name: str, root: Path | None, split: str, **kwargs: Any) -> Any:
    """Images of a folder, of a tar file or of a dataset of timm.

    Args:
        name: As for timm's `create_dataset`: '' for a folder or tar file, 'hfds/...', 'wds/...' and others.
        root: Its folder or file, None for data that need none.
        split: Of it.
        kwargs: For `create_dataset`.

    Returns:
        A `Folder`, one of timm's readers or a dataset of torchvision, which have indices; or an iterable dataset.

    Raises:
        ValueError: There is no such folder, no image in it, or the data cannot be used.
    """
    if not name and (root is None or not root.exists()):
        where = f' {root}' if root else ''
        raise ValueError(f'There is no --data-dir{where}: name the folder or tar file that holds the images.')
    try:
        if name:
            dataset: Any = create_dataset(
                name, root=str(root) if root else None, split=split, is_training=True, input_img_mode='', **kwargs)
            dataset = dataset if hasattr(dataset, 'set_loader_cfg') else getattr(dataset, 'reader', dataset)
        elif (path := Path(str(root))).is_dir():
            within = dict.fromkeys((split, *(TRAIN if split in TRAIN else ())))
            folder = next((path / name for name in within if (path / name).is_dir()), path)
            if folder == path and split not in ('', *TRAIN):
                raise ValueError(f'it has no folder {split!r}, the --train-split')
            dataset = Folder(folder)
        else:
            check_regular_file(path)
            dataset = ReaderImageInTar(str(path))
        if len(dataset) == 0:
            raise ValueError(f'no name in it ends in {", ".join(get_img_extensions())}')
    except Exception as error:  # whatever timm, tarfile, torchvision, datasets or webdataset raise
        what, kind = (f'--dataset {name}', '') if name else (
            f'--data-dir {root}', '; name a folder of images, or a tar file of them that is not compressed')
        why = ' '.join(str(error).split()) or type(error).__name__
        raise ValueError(f'{what} cannot be used: {why}{kind}') from error
    return dataset

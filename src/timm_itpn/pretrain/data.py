"""Samples of pre-training: one crop of an image for student and teacher, and a mask.

What is random in a sample follows from seed, epoch and index alone, so it does not matter which worker of which process
makes it, nor how often the run was interrupted.
"""
import contextlib
import itertools
import logging
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import RandomResizedCropAndInterpolation, create_dataset, str_to_interp_mode
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from torchvision.transforms import functional as TF

from .masking import MASKINGS

__all__ = ['Crop', 'EpochSampler', 'MaskMaker', 'Samples', 'StreamedSamples', 'View', 'create_loader', 'open_dataset']


class View(NamedTuple):
    """How student or teacher sees a crop: size (height, width) in pixels, mean and standard deviation per channel."""
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Crop:
    """Random crop and flip, seen by several: an image -> its views (3, H, W), float32.

    Args:
        views: Who sees it.
        scale: Smallest and largest share of the image's area.
        ratio: Smallest and largest width by height.
        hflip: Probability of a flip.
        interpolation: As timm names it.
    """

    def __init__(
            self,
            views: tuple[View, ...],
            scale: tuple[float, float] = (0.2, 1.),
            ratio: tuple[float, float] = (3 / 4, 4 / 3),
            hflip: float = 0.5,
            interpolation: str = 'bicubic',
    ):
        self.views = views
        self.scale = scale
        self.ratio = ratio
        self.hflip = hflip
        self.interpolation = str_to_interp_mode(interpolation)

    def __call__(self, image: Any) -> tuple[torch.Tensor, ...]:
        box = RandomResizedCropAndInterpolation.get_params(image, self.scale, self.ratio)
        flip = bool(torch.rand(()) < self.hflip)
        return tuple(self._see(view, image, box, flip) for view in self.views)

    def _see(self, view: View, image: Any, box: tuple[int, int, int, int], flip: bool) -> torch.Tensor:
        image = TF.resized_crop(image, *box, size=list(view.size), interpolation=self.interpolation)
        if flip:
            image = TF.hflip(image)
        return TF.normalize(TF.to_tensor(image), view.mean, view.std)


class MaskMaker:
    """Puts a mask to the views of an image.

    Args:
        grid_size: Tokens (height, width) of the student.
        masking: Key of `MASKINGS`.
        num_masked: Tokens that are masked.
    """

    def __init__(self, grid_size: tuple[int, int], masking: str, num_masked: int):
        self.grid_size = grid_size
        self.masking: Callable = MASKINGS[masking]
        self.num_masked = num_masked

    def sample(self, views: tuple[torch.Tensor, ...], seed: int, skipped: int) -> dict[str, torch.Tensor]:
        """'images', for a teacher 'teacher_images', 'masked' (h, w), and 'skipped': files that could not be read."""
        masked = self.masking(self.grid_size, self.num_masked, torch.Generator().manual_seed(seed))
        images = dict(zip(('images', 'teacher_images'), views))
        return {**images, 'masked': masked, 'skipped': torch.tensor(skipped)}


class Samples(Dataset):
    """Samples by position, which is epoch * number of images + index of the image.

    Args:
        dataset: A dataset of timm that has indices; its transform is set.
        crop: What is done with an image.
        maker: Of the masks.
        seed: Of all that is random.
    """

    def __init__(self, dataset: Any, crop: Crop, maker: MaskMaker, seed: int):
        dataset.transform = crop
        self.dataset = dataset
        self.maker = maker
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        seed = seed_of(self.seed, position)
        with seeded(seed), Skipped() as skipped:
            views, _ = self.dataset[position % len(self.dataset)]
        return self.maker.sample(views, seed, skipped.count)


class StreamedSamples(IterableDataset):
    """Samples of a dataset that can only be read from its start, as WebDataset's.

    What is random follows from seed, epoch, process, worker and count.

    Args:
        dataset: An iterable dataset of timm; its transform is set.
        crop: What is done with an image.
        maker: Of the masks.
        seed: Of all that is random.
        rank: Of the process.
    """

    def __init__(self, dataset: Any, crop: Crop, maker: MaskMaker, seed: int, rank: int):
        dataset.transform = crop
        self.dataset = dataset
        self.maker = maker
        self.seed = seed
        self.rank = rank
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        images = iter(self.dataset)
        for count in itertools.count():
            seed = seed_of(self.seed, self.epoch, self.rank, 0 if worker is None else worker.id, count)
            with seeded(seed):
                views, _ = next(images, (None, None))
            if views is None:
                return
            yield self.maker.sample(views, seed, 0)


def seed_of(*numbers: int) -> int:
    """A seed for all libraries, 32 bits, that is another for other numbers."""
    return zlib.crc32(repr(numbers).encode())


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed what transforms draw from; afterwards all is as it was, for what the model draws in the same process."""
    generator = torch.default_generator
    states = random.getstate(), np.random.get_state(), generator.get_state()  # noqa: NPY002  transforms use it
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  transforms use it
    generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002  transforms use it
        generator.set_state(states[2])


class Skipped(logging.Handler):
    """Counts the files that timm's dataset skips because they cannot be read; it tells of them in its log only."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += record.getMessage().startswith('Skipped sample')

    def __enter__(self) -> 'Skipped':
        logging.getLogger('timm.data.dataset').addHandler(self)
        return self

    def __exit__(self, *_: Any) -> None:
        logging.getLogger('timm.data.dataset').removeHandler(self)


class EpochSampler(Sampler):
    """Positions of one process: a new order in each epoch, whole batches of all processes only.

    Args:
        num_images: In the dataset.
        batch_size: Images of one process per batch.
        rank: Of the process.
        world_size: Number of processes.
        seed: Of the order.

    Attributes:
        epoch: Whose positions come next.
        first_batch: Batches of that epoch that are done already.
    """

    def __init__(self, num_images: int, batch_size: int, rank: int, world_size: int, seed: int):
        self.num_images = num_images
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.num_batches = num_images // (batch_size * world_size)
        self.epoch = 0
        self.first_batch = 0

    def __len__(self) -> int:
        return (self.num_batches - self.first_batch) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.num_images, generator=generator) + self.epoch * self.num_images
        step = self.batch_size * self.world_size
        order = order[self.first_batch * step:self.num_batches * step]
        return iter(order[self.rank::self.world_size].tolist())


def open_dataset(name: str, root: Path | None, split: str, **kwargs: Any) -> Any:
    """A dataset of timm.

    Args:
        name: As for timm's `create_dataset`: '' for a folder or tar file, 'hfds/...', 'wds/...' and others.
        root: Its folder or file, None for data that need none.
        split: Of it.
        kwargs: For `create_dataset`.

    Raises:
        ValueError: There is no such folder, or no image in it.
    """
    if not name and (root is None or not root.exists()):
        raise ValueError(f'--data-dir {root} does not exist: give the folder that holds the images.')
    try:
        dataset = create_dataset(
            name, root=None if root is None else str(root), split=split, is_training=True, **kwargs)
    except RuntimeError as error:  # timm's, where a folder has no images
        raise ValueError(f'--data-dir {root} cannot be used: {error}') from error
    if not name:
        report_empty(dataset)
    return dataset


def report_empty(dataset: Any) -> None:
    """Raise ValueError if a class of a folder has no image: a part of the data has got lost."""
    folder = Path(dataset.reader.root)
    if not folder.is_dir():  # a tar file
        return
    names = {Path(name).parts[0] for name in dataset.filenames(basename=False) if len(Path(name).parts) > 1}
    empty: list[str] = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in names)
    if empty:
        raise ValueError(f'{folder} has classes without images: {", ".join(empty)}. Fill or remove them.')


def create_loader(
        samples: Dataset,
        batch_size: int,
        workers: int,
        sampler: Any = None,
        device: str = 'cpu',
) -> DataLoader:
    """Batches of samples; dicts of stacked tensors."""
    generator = torch.Generator()  # else every pass draws a seed from the one that the model draws from
    return DataLoader(
        samples, batch_size, sampler=sampler, num_workers=workers, drop_last=True, pin_memory=device.startswith('cuda'),
        generator=generator)

"""Samples of pre-training: one crop of an image for student and teacher, and a mask.

Everything random in a sample follows from seed, epoch and index, so it does not matter which worker of which process
makes it, nor how often the run was interrupted.
"""
import logging
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import create_dataset, str_to_interp_mode
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, get_worker_info
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

__all__ = ['Batches', 'SampleMaker', 'Samples', 'StreamedSamples', 'View', 'open_dataset']

Sample = dict[str, torch.Tensor]


class View(NamedTuple):
    """How student or teacher sees a crop: size (height, width) in pixels, mean and standard deviation per channel."""
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class SampleMaker(NamedTuple):
    """Crops an image for student and teacher, and adds a mask."""
    views: tuple[View, ...]  # of the student and, if there is one, of the teacher
    grid_size: tuple[int, int]  # tokens (height, width) of the student
    masking: Callable  # value of `MASKINGS`
    num_masked: int  # tokens that are masked
    seed: int  # of everything random
    scale: tuple[float, float] = (0.2, 1.)  # smallest and largest share of the image's area that is cropped
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # smallest and largest width by height of the crop
    hflip: float = 0.5  # probability of a horizontal flip
    interpolation: str = 'bicubic'  # as timm names it

    def __call__(self, image: Any, skipped: int, *number: int) -> Sample:
        """Make a sample.

        Args:
            image: PIL image.
            skipped: Files that could not be read before this one.
            number: Of the sample; the same number gives the same crop and mask.

        Returns:
            'images' (3, H, W), for a teacher 'teacher_images', 'masked' (h, w), and 'skipped'.
        """
        generator = torch.default_generator  # the one that RandomResizedCrop draws from
        with torch.random.fork_rng(devices=[]):  # and, in this process, the model too
            generator.manual_seed(zlib.crc32(repr((self.seed, *number)).encode()))
            box = RandomResizedCrop.get_params(image, list(self.scale), list(self.ratio))
            flip = bool(torch.rand(()) < self.hflip)
            masked = self.masking(self.grid_size, self.num_masked, generator)
        images = [self._see(view, image, box, flip) for view in self.views]
        return {**dict(zip(('images', 'teacher_images'), images)), 'masked': masked, 'skipped': torch.tensor(skipped)}

    def _see(self, view: View, image: Any, box: tuple[int, int, int, int], flip: bool) -> torch.Tensor:
        image = TF.resized_crop(image, *box, list(view.size), str_to_interp_mode(self.interpolation))
        return TF.normalize(TF.to_tensor(TF.hflip(image) if flip else image), list(view.mean), list(view.std))


class Samples(Dataset):
    """Samples, in an epoch, of a dataset of timm that has indices."""

    def __init__(self, dataset: Any, make: SampleMaker):
        self.dataset = dataset
        self.make = make
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        with _skipped_samples() as skipped:
            image, _ = self.dataset[index]
        return self.make(image, len(skipped), self.epoch, index)


class StreamedSamples(IterableDataset):
    """Samples, in an epoch, of a dataset of timm that can only be read from its start, as WebDataset's.

    Everything random follows from seed, epoch, process, worker and count.
    """

    def __init__(self, dataset: Any, make: SampleMaker, rank: int):
        self.dataset = dataset
        self.make = make
        self.rank = rank
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        for count, (image, _) in enumerate(self.dataset):
            yield self.make(image, 0, self.epoch, self.rank, 0 if worker is None else worker.id, count)


@contextmanager
def _skipped_samples() -> Iterator[list[str]]:
    """What timm's dataset says of the files that it skips because they cannot be read; only its log tells of them."""
    messages: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        messages.extend(re.findall('^Skipped sample.*', record.getMessage()))
        return True

    logger = logging.getLogger('timm.data.dataset')
    logger.addFilter(note)
    try:
        yield messages
    finally:
        logger.removeFilter(note)


class Batches:
    """The batches of one process; all processes together see each image at most once per epoch.

    Args:
        dataset: From `open_dataset`.
        make: Makes the samples.
        batch_size: Images of one process per batch.
        workers: Processes that read, 0 for none.
        rank: Of the process.
        world_size: Number of processes.
        pin_memory: For copies to a GPU.

    Attributes:
        num_images: In the dataset.
        per_epoch: Batches of one epoch.
        resumable: An epoch can start in the middle.
    """

    def __init__(
            self,
            dataset: Any,
            make: SampleMaker,
            batch_size: int,
            workers: int = 0,
            rank: int = 0,
            world_size: int = 1,
            pin_memory: bool = False,
    ):
        self.resumable = not hasattr(dataset, 'set_loader_cfg')
        if self.resumable:
            self.samples: Samples | StreamedSamples = Samples(dataset, make)
            self.order = DistributedSampler[int](self.samples, world_size, rank, seed=make.seed, drop_last=True)
        else:
            dataset.set_loader_cfg(num_workers=max(1, workers))
            self.samples = StreamedSamples(dataset, make, rank)
        self.num_images = len(self.samples)
        self.per_epoch = self.num_images // (batch_size * world_size)
        self.batch_size = batch_size
        self.workers = workers
        self.pin_memory = pin_memory

    def epoch(self, epoch: int, first: int = 0) -> DataLoader:
        """The batches of an epoch, dicts of stacked tensors, without the first ones that are done already."""
        self.samples.epoch = epoch
        order: list[int] | None = None
        if self.resumable:
            self.order.set_epoch(epoch)
            order = list(self.order)[first * self.batch_size:]
        else:
            self.samples.dataset.set_epoch(epoch)
        generator = torch.Generator()  # else every epoch draws a seed from the generator that the model draws from
        return DataLoader(
            self.samples, self.batch_size, sampler=order, num_workers=self.workers, drop_last=True,
            pin_memory=self.pin_memory, generator=generator)


def open_dataset(name: str, root: Path | None, split: str, **kwargs: Any) -> Any:
    """A dataset of timm, of PIL images.

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
        dataset = create_dataset(name, root=str(root) if root else None, split=split, is_training=True, **kwargs)
    except RuntimeError as error:  # timm's, where a folder has no images
        raise ValueError(f'--data-dir {root} cannot be used: {error}') from error
    return dataset

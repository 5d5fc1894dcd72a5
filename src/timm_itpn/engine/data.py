"""Samples in the order of a run. Whatever cannot be read is replaced, and named.

The order, and everything random in a sample, follow from seed, epoch and index, so it does not matter which worker of
which process makes a sample, nor how often the run was interrupted.
"""
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, default_collate

from ..checks import printable

__all__ = ['NUM_OTHERS', 'Batches', 'Replacing', 'load', 'seeded', 'to_rgb']

NUM_OTHERS = 40  # random samples that are tried in place of one; if half of all are whole, one of so many is


def to_rgb(image: Any) -> Any:
    """A PIL image in RGB, of 8 bits per channel: the upper ones of 16, and without transparency.

    Raises:
        ValueError: Nothing tells which of its values is white.
    """
    if image.mode == 'F':
        raise ValueError('floats')
    if image.mode.startswith('I'):
        values = np.asarray(image)
        if values.min() < 0 or values.max() >= 2 ** 16:
            raise ValueError('more than 16 bits')
        if image.mode != 'I' or values.max() >= 2 ** 8:  # I has 32 bits, of which files use 8 or 16
            values = values >> 8
        image = Image.fromarray(values.astype(np.uint8))
    if image.mode in ('P', 'PA'):
        image = image.convert('RGBA')  # as Pillow asks for, where the palette has transparency
    return image.convert('RGB')


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """torch's generator, from which samples draw, starts from the numbers; the model goes on with it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(zlib.crc32(repr(numbers).encode()))
        yield


class Replacing(Dataset):
    """Samples of an epoch, with the names of files that cannot be read, whose places random other samples take.

    Args:
        samples: Data set with, for the name of a file, `name(index)`; it draws from torch's generator, and may raise
            anything.
        seed: Of everything random.
        epoch: Other epochs have other random numbers.
        num_others: How many others are tried.
    """

    def __init__(self, samples: Any, seed: int = 0, epoch: int = 0, num_others: int = NUM_OTHERS):
        self.samples = samples
        self.seed = seed
        self.epoch = epoch
        self.num_others = num_others

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, list[str]]:
        """A sample, None if all that were tried cannot be read, and the names of those that cannot."""
        generator = np.random.default_rng((self.seed, self.epoch, index))
        unreadable: list[str] = []
        for at in (index, *generator.integers(len(self), size=self.num_others).tolist()):
            try:
                with seeded(self.seed, self.epoch, at):
                    return self.samples[at], unreadable
            except Exception as error:  # whatever a file makes one of Pillow's many readers do
                unreadable.append(printable(f'{self.samples.name(at)} ({type(error).__name__})'))
        return None, unreadable

    def collate(self, items: list[tuple[Any, list[str]]]) -> dict[str, Any]:
        """A batch of the samples that are there, and 'unreadable', the names of each."""
        samples = [sample for sample, _ in items if sample is not None]
        batch = getattr(self.samples, 'collate', default_collate)(samples) if samples else {}
        return {**batch, 'unreadable': [names for _, names in items]}


def load(samples: Replacing, **options: Any) -> DataLoader:
    """A loader that does not touch the generator which a model draws from."""
    return DataLoader(samples, collate_fn=samples.collate, generator=torch.Generator(), **options)


class Batches:
    """The batches of one process; all processes together see each sample at most once per epoch.

    Args:
        samples: What `Replacing` takes, or an iterable `Replacing`.
        batch_size: Samples of one process per batch.
        seed: Of the order, and of everything random in a sample.
        workers: Processes that read, 0 for none.
        rank: Of the process.
        world_size: Number of processes.
        pin_memory: For copies to a GPU.

    Attributes:
        num_samples: In the data set.
        per_epoch: Batches of one epoch.
        resumable: An epoch can start in the middle.
    """

    def __init__(
            self, samples: Any, batch_size: int, seed: int = 0, workers: int = 0, rank: int = 0, world_size: int = 1,
            pin_memory: bool = False):
        self.samples = samples
        self.seed = seed
        self.resumable = not isinstance(samples, IterableDataset)
        if self.resumable:
            self.order = DistributedSampler[int](samples, world_size, rank, seed=seed, drop_last=True)
        self.num_samples = len(samples)
        self.per_epoch = self.num_samples // (batch_size * world_size)
        self.options: dict[str, Any] = dict(
            batch_size=batch_size, num_workers=workers, drop_last=True, pin_memory=pin_memory)

    def epoch(self, epoch: int, first: int = 0) -> DataLoader:
        """The batches of an epoch, dicts of stacked tensors, without the first ones that are done already."""
        if not self.resumable:
            self.samples.epoch = epoch
            return load(self.samples, **self.options)
        self.order.set_epoch(epoch)
        order = list(self.order)[first * self.options['batch_size']:]
        return load(Replacing(self.samples, self.seed, epoch), sampler=order, **self.options)

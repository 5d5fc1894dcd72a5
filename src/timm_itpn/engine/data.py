"""Samples in the order of a run. Whatever cannot be read is replaced, and named.

The order, and everything random in a sample, follow from seed, epoch and index, so it does not matter which worker of
which process makes a sample, nor how often the run was interrupted.
"""
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, default_collate

from ..checks import printable

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


@dataclass(eq=False)
class Replacing(Dataset):
    """Samples of an epoch, with the names of files that cannot be read, whose places random other samples take."""
    samples: Any  # data set with `name(index)`, of a file; it draws from torch's generator, and may raise anything
    seed: int = 0  # of everything random
    epoch: int = 0  # other epochs have other random numbers
    num_others: int = NUM_OTHERS  # how many others are tried

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


class Batches(NamedTuple):
    """The batches of one process; all processes together see each sample at most once per epoch."""
    samples: Any  # what `Replacing` takes, or an iterable `Replacing`
    batch_size: int  # samples of one process per batch
    seed: int = 0  # of the order, and of everything random in a sample
    workers: int = 0  # processes that read, 0 for none
    rank: int = 0  # of the process
    world_size: int = 1  # number of processes
    pin_memory: bool = False  # for copies to a GPU

    @property
    def per_epoch(self) -> int:
        """Batches of one epoch."""
        return len(self.samples) // (self.batch_size * self.world_size)

    @property
    def resumable(self) -> bool:
        """An epoch can start in the middle."""
        return not isinstance(self.samples, IterableDataset)

    def epoch(self, epoch: int, first: int = 0) -> DataLoader:
        """The batches of an epoch, dicts of stacked tensors, without the first ones that are done already."""
        options: dict[str, Any] = dict(
            batch_size=self.batch_size, num_workers=self.workers, drop_last=True, pin_memory=self.pin_memory)
        if not self.resumable:
            self.samples.epoch = epoch
            return load(self.samples, **options)
        order = DistributedSampler[int](self.samples, self.world_size, self.rank, seed=self.seed, drop_last=True)
        order.set_epoch(epoch)
        return load(
            Replacing(self.samples, self.seed, epoch), sampler=list(order)[first * self.batch_size:], **options)

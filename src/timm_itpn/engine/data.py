"""Samples in the order of a run. Whatever cannot be read is replaced, and named.

The order, and everything random in a sample, follow from seed, epoch and index, so it does not matter which worker of
which process makes a sample, nor how often the run was interrupted.
"""
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, default_collate

from ..checks import printable

__all__ = ['NUM_OTHERS', 'Batches', 'Replacing', 'load', 'to_rgb']

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


class Replacing(Dataset):
    """Samples with the names of files that cannot be read; a random other sample takes the place of theirs.

    Args:
        samples: Data set with `seed`, `epoch` and, for the name of a file, `name(index)`; it may raise anything.
        num_others: How many others are tried.
    """

    def __init__(self, samples: Any, num_others: int = NUM_OTHERS):
        self.samples = samples
        self.num_others = num_others

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, list[str]]:
        """A sample, None if all that were tried cannot be read, and the names of those that cannot."""
        generator = np.random.default_rng((self.samples.seed, self.samples.epoch, index))
        unreadable: list[str] = []
        for at in (index, *generator.integers(len(self), size=self.num_others).tolist()):
            try:
                return self.samples[at], unreadable
            except Exception as error:  # whatever a file makes one of Pillow's many readers do
                unreadable.append(printable(f'{self.samples.name(at)} ({type(error).__name__})'))
        return None, unreadable

    def collate(self, items: list[tuple[Any, list[str]]]) -> dict[str, Any]:
        """A batch of the samples that are there, and 'unreadable', the names of each."""
        samples = [sample for sample, _ in items if sample is not None]
        batch = getattr(self.samples, 'collate', default_collate)(samples) if samples else {}
        return {**batch, 'unreadable': [names for _, names in items]}


def load(samples: Any, **options: Any) -> DataLoader:
    """A loader that does not touch the generator which a model draws from."""
    return DataLoader(samples, collate_fn=getattr(samples, 'collate', None), generator=torch.Generator(), **options)


class Batches:
    """The batches of one process; all processes together see each sample at most once per epoch.

    Args:
        samples: Data set with `seed` and `epoch`; what `Replacing` takes, or an iterable one of what it gives.
        batch_size: Samples of one process per batch.
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
            self, samples: Any, batch_size: int, workers: int = 0, rank: int = 0, world_size: int = 1,
            pin_memory: bool = False):
        self.samples = samples
        self.resumable = not isinstance(samples, IterableDataset)
        if self.resumable:
            self.order = DistributedSampler[int](samples, world_size, rank, seed=samples.seed, drop_last=True)
        self.num_samples = len(samples)
        self.per_epoch = self.num_samples // (batch_size * world_size)
        self.options: dict[str, Any] = dict(
            batch_size=batch_size, num_workers=workers, drop_last=True, pin_memory=pin_memory)

    def epoch(self, epoch: int, first: int = 0) -> DataLoader:
        """The batches of an epoch, dicts of stacked tensors, without the first ones that are done already."""
        self.samples.epoch = epoch
        if not self.resumable:
            return load(self.samples, **self.options)
        self.order.set_epoch(epoch)
        order = list(self.order)[first * self.options['batch_size']:]
        return load(Replacing(self.samples), sampler=order, **self.options)

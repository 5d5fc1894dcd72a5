"""Samples, their order and their randomness."""
import random
import tarfile

import numpy as np
import pytest
import torch
from support.pretrain_runs import write_images

from timm_itpn.pretrain.data import (
    Crop,
    EpochSampler,
    MaskMaker,
    Samples,
    StreamedSamples,
    View,
    create_loader,
    open_dataset,
    seeded,
)

STUDENT = View((64, 64), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
TEACHER = View((56, 56), (0.4, 0.4, 0.4), (0.2, 0.2, 0.2))


def samples(folder, seed=0, views=(STUDENT, TEACHER)):
    dataset = open_dataset('', folder, 'train')
    return Samples(dataset, Crop(views), MaskMaker((4, 4), 'random', 6), seed)


def test_sample_follows_from_seed_and_position_alone(tmp_path):
    data = samples(write_images(tmp_path))
    random.seed(1)
    first = data[13]
    random.seed(2)
    torch.manual_seed(2)
    again = data[13]
    assert all(torch.equal(first[key], again[key]) for key in first)
    for other in (data[3], samples(tmp_path, seed=1)[13]):  # the same image in another epoch, or of another run
        assert not torch.equal(first['images'], other['images'])
    assert first['images'].shape == (3, 64, 64) and first['teacher_images'].shape == (3, 56, 56)
    assert first['masked'].shape == (4, 4) and int(first['masked'].sum()) == 6 and int(first['skipped']) == 0


def test_generators_are_left_as_they_were(tmp_path):
    data = samples(write_images(tmp_path))
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002  as transforms do
    torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002  as transforms do
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002  as transforms do
    torch.manual_seed(3)
    data[0]
    assert (random.random(), np.random.rand(), torch.rand(())) == expected  # noqa: NPY002  as transforms do
    with pytest.raises(KeyError), seeded(1):
        raise KeyError


def test_student_and_teacher_see_the_same_crop(tmp_path):
    """At the same size and normalisation they get the same image."""
    data = samples(write_images(tmp_path), views=(STUDENT, STUDENT))
    for i in range(10):
        sample = data[i]
        assert torch.equal(sample['images'], sample['teacher_images'])
    small = samples(tmp_path)[0]
    student = small['images'] * 0.25 + 0.5
    teacher = small['teacher_images'] * 0.2 + 0.4
    reduced = torch.nn.functional.interpolate(student[None], (56, 56), mode='bicubic', antialias=True)[0]
    assert (reduced - teacher).abs().mean() < 0.5 * (reduced - teacher.flip(2)).abs().mean()


@pytest.mark.parametrize('world_size', [1, 2])
def test_order_is_new_in_each_epoch_and_the_same_for_any_number_of_processes(world_size):
    samplers = [EpochSampler(21, 4 // world_size, rank, world_size, seed=5) for rank in range(world_size)]
    epochs = []
    for epoch in (0, 1):
        for sampler in samplers:
            sampler.epoch = epoch
        parts = [torch.tensor(list(sampler)).reshape(5, -1) for sampler in samplers]
        epochs.append(torch.stack(parts, dim=2).flatten(1))  # batches of all processes
    whole = EpochSampler(21, 4, 0, 1, seed=5)
    assert torch.equal(epochs[0], torch.tensor(list(whole)).reshape(5, 4))
    assert len(set(epochs[0].flatten().tolist())) == 20 and epochs[0].max() < 21 <= epochs[1].min()
    assert not torch.equal(epochs[0], epochs[1] - 21)


def test_order_goes_on_where_it_was():
    sampler = EpochSampler(21, 4, 0, 1, seed=5)
    whole = list(sampler)
    sampler.first_batch = 3
    assert list(sampler) == whole[12:] and len(sampler) == 8


def test_tar_files_are_read(tmp_path):
    write_images(tmp_path)
    with tarfile.open(tmp_path / 'all.tar', 'w') as tar:
        tar.add(tmp_path / 'train', 'train')
    dataset = open_dataset('', tmp_path / 'all.tar', 'train')
    assert len(dataset) == 10 and dataset[0][0].size == (48, 40)


class Stream:
    """A dataset of timm that has no indices."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return ((self.transform(image), 0) for image in self.images)


def test_streams_give_the_same_samples_again_and_others_in_the_next_epoch(tmp_path):
    images = [image for image, _ in open_dataset('', write_images(tmp_path), 'train')]
    data = StreamedSamples(Stream(images), Crop((STUDENT,)), MaskMaker((4, 4), 'block', 6), seed=0, rank=0)
    first, again = list(data), list(data)
    data.set_epoch(1)
    other = list(data)
    assert len(first) == len(images) == len(other)
    assert all(torch.equal(a['images'], b['images']) and torch.equal(a['masked'], b['masked'])
               for a, b in zip(first, again))
    assert not torch.equal(first[0]['images'], other[0]['images'])
    batches = list(create_loader(data, 4, workers=2))
    assert sum(len(batch['images']) for batch in batches) == 16  # each worker reads all of a stream that is not split

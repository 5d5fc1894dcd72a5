"""Samples, their order and their randomness."""
import tarfile

import pytest
import torch
import torch.nn.functional as F
from support.pretrain_runs import write_images

from timm_itpn.pretrain.data import Batches, SampleMaker, Samples, StreamedSamples, View, open_dataset
from timm_itpn.pretrain.masking import random_masking

STUDENT = View((64, 64), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
TEACHER = View((56, 56), (0.4, 0.4, 0.4), (0.2, 0.2, 0.2))


def maker(seed=0, views=(STUDENT, TEACHER)):
    return SampleMaker(views, (4, 4), random_masking, 6, seed)


def samples(folder, epoch=0, **kwargs):
    data = Samples(open_dataset('', folder, 'train'), maker(**kwargs))
    data.epoch = epoch
    return data


def test_sample_follows_from_seed_epoch_and_index_alone(tmp_path):
    data = samples(write_images(tmp_path))
    first = data[3]
    torch.manual_seed(2)
    again = data[3]
    assert all(torch.equal(first[key], again[key]) for key in first)
    for other in (samples(tmp_path, epoch=1)[3], samples(tmp_path, seed=1)[3]):
        assert not torch.equal(first['images'], other['images'])
    assert first['images'].shape == (3, 64, 64) and first['teacher_images'].shape == (3, 56, 56)
    assert first['masked'].shape == (4, 4) and int(first['masked'].sum()) == 6 and int(first['skipped']) == 0


def test_generator_of_the_model_is_left_as_it_was(tmp_path):
    data = samples(write_images(tmp_path))
    state = torch.get_rng_state()
    data[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_student_and_teacher_see_the_same_crop(tmp_path):
    """At the same size and normalisation they get the same image."""
    data = samples(write_images(tmp_path), views=(STUDENT, STUDENT))
    for i in range(10):
        sample = data[i]
        assert torch.equal(sample['images'], sample['teacher_images'])
    small = samples(tmp_path)[0]
    student = small['images'] * 0.25 + 0.5
    teacher = small['teacher_images'] * 0.2 + 0.4
    reduced = F.interpolate(student[None], (56, 56), mode='bicubic', antialias=True)[0]
    assert (reduced - teacher).abs().mean() < 0.5 * (reduced - teacher.flip(2)).abs().mean()


class Numbered:
    """A dataset of timm whose 21 images are their indices."""

    def __len__(self):
        return 21

    def __getitem__(self, index):
        return index, -1


def number_of(image, skipped, epoch, index):
    return {'index': torch.tensor(image), 'epoch': torch.tensor(epoch)}


number_of.seed = 5


def order(world_size, epoch, first=0):
    """Indices by batch of all processes."""
    ranks = [Batches(Numbered(), number_of, 4 // world_size, 0, rank, world_size) for rank in range(world_size)]
    assert all(batches.per_epoch == 5 for batches in ranks)
    return [torch.cat([batch['index'] for batch in step]).sort().values.tolist()
            for step in zip(*(batches.epoch(epoch, first) for batches in ranks))]


def test_order_is_new_in_each_epoch_and_the_same_for_any_number_of_processes():
    assert order(1, 0) == order(2, 0) == order(4, 0) and order(1, 1) == order(2, 1) != order(1, 0)
    assert len(set(sum(order(1, 0), []))) == 20


@pytest.mark.parametrize('world_size', [1, 2])
def test_epoch_goes_on_where_it_was(world_size):
    assert order(world_size, 1, first=3) == order(world_size, 1)[3:]


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

    def set_loader_cfg(self, num_workers):
        pass

    def set_epoch(self, epoch):
        pass

    def __iter__(self):
        return ((image, 0) for image in self.images)


def test_streams_give_the_same_samples_again_and_others_in_the_next_epoch(tmp_path):
    images = [image for image, _ in open_dataset('', write_images(tmp_path), 'train')]
    data = StreamedSamples(Stream(images), maker(), rank=0)
    first, again = list(data), list(data)
    data.epoch = 1
    other = list(data)
    assert len(first) == len(images) == len(other)
    assert all(torch.equal(a['images'], b['images']) and torch.equal(a['masked'], b['masked'])
               for a, b in zip(first, again))
    assert not torch.equal(first[0]['images'], other[0]['images'])
    batches = list(Batches(Stream(images), maker(), 4, workers=2).epoch(0))
    assert sum(len(batch['images']) for batch in batches) == 16  # each worker reads all of a stream that is not split

"""Samples, their order and their randomness."""
import io
import os
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.pretrain_runs import write_images

from timm_itpn.engine.data import Batches, Replacing, to_rgb
from timm_itpn.pretrain.data import (
    SampleMaker,
    Samples,
    StreamedSamples,
    View,
    fingerprint,
    open_dataset,
    random_masking,
)

STUDENT = View((64, 64), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
TEACHER = View((56, 56), (0.4, 0.4, 0.4), (0.2, 0.2, 0.2))


def maker(views=(STUDENT, TEACHER)):
    return SampleMaker(views, (4, 4), random_masking, 6)


def samples(folder, seed=0, epoch=0, **kwargs):
    return Replacing(Samples(open_dataset('', folder, 'train'), maker(**kwargs)), seed, epoch)


def test_sample_follows_from_seed_epoch_and_index_alone(tmp_path):
    data = samples(write_images(tmp_path))
    first, _ = data[3]
    torch.manual_seed(2)
    again, _ = data[3]
    assert all(torch.equal(first[key], again[key]) for key in ('images', 'teacher_images', 'masked'))
    for other in (samples(tmp_path, epoch=1)[3][0], samples(tmp_path, seed=1)[3][0]):
        assert not torch.equal(first['images'], other['images'])
    assert first['images'].shape == (3, 64, 64) and first['teacher_images'].shape == (3, 56, 56)
    assert first['masked'].shape == (4, 4) and int(first['masked'].sum()) == 6


def test_generator_of_the_model_is_left_as_it_was(tmp_path):
    data = samples(write_images(tmp_path))
    state = torch.get_rng_state()
    data[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_student_and_teacher_see_the_same_crop(tmp_path):
    """At the same size and normalisation they get the same image."""
    data = samples(write_images(tmp_path), views=(STUDENT, STUDENT))
    for i in range(10):
        sample, _ = data[i]
        assert torch.equal(sample['images'], sample['teacher_images'])
    small, _ = samples(tmp_path)[0]
    student = small['images'] * 0.25 + 0.5
    teacher = small['teacher_images'] * 0.2 + 0.4
    reduced = F.interpolate(student[None], (56, 56), mode='bicubic', antialias=True)[0]
    assert (reduced - teacher).abs().mean() < 0.5 * (reduced - teacher.flip(2)).abs().mean()


class Numbered(torch.utils.data.Dataset):
    """21 samples, which are their numbers."""

    def __len__(self):
        return 21

    def __getitem__(self, index):
        return {'index': torch.tensor(index)}


def order(world_size, epoch, first=0):
    """Indices by batch of all processes."""
    ranks = [Batches(Numbered(), 4 // world_size, 5, 0, rank, world_size) for rank in range(world_size)]
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
    assert len(dataset) == 10 and Image.open(dataset[0][0]).size == (48, 40)


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
    images = [Image.open(file) for file, _ in open_dataset('', write_images(tmp_path), 'train')]
    data = StreamedSamples(Stream(images), maker(), seed=0, rank=0, workers=2)
    first, again = ([sample for sample, _ in data] for _ in range(2))
    data.epoch = 1
    other = [sample for sample, _ in data]
    assert len(first) == len(images) == len(other)
    assert all(torch.equal(a['images'], b['images']) and torch.equal(a['masked'], b['masked'])
               for a, b in zip(first, again))
    assert not torch.equal(first[0]['images'], other[0]['images'])
    batches = list(Batches(data, 4, workers=2).epoch(0))
    assert sum(len(batch['images']) for batch in batches) == 16  # each worker reads all of a stream that is not split


def test_images_of_a_stream_that_cannot_be_read_are_replaced_and_named(tmp_path):
    """By the one before."""
    (tmp_path / 'cut.png').write_bytes((write_images(tmp_path) / 'train' / 'class0' / '000.png').read_bytes()[:-100])
    whole, bad = Image.new('RGB', (40, 40), 'red'), Image.new('F', (4, 4))
    data = StreamedSamples(Stream([bad, bad, whole, Image.open(tmp_path / 'cut.png'), bad]), maker(), 0, 0, 0)
    batch, = Batches(data, 5).epoch(0)
    assert [len(names) for names in batch['unreadable']] == [1, 1, 0, 1, 1] and batch['images'].shape[0] == 5
    assert batch['unreadable'][3] == ['image 4 of worker 0 (OSError)']
    with pytest.raises(RuntimeError, match='The data cannot be read on after 1 images: '):
        list(StreamedSamples(Stream(map(Image.Image.copy, [whole, None])), maker(), 0, 0, 0))


@pytest.mark.parametrize(('mode', 'value', 'expected'), [
    ('1', 255, (255, 255, 255)), ('L', 7, (7, 7, 7)), ('LA', (7, 0), (7, 7, 7)), ('RGBA', (1, 2, 3, 0), (1, 2, 3)),
    ('I;16', 0x8001, (128, 128, 128)), ('I;16B', 0x8001, (128, 128, 128)), ('I;16', 200, (0, 0, 0)),
    ('I', 0x8001, (128, 128, 128)), ('I', 200, (200, 200, 200)), ('I', 70_000, None), ('I', -1, None), ('F', 0.5, None),
    ('CMYK', (0, 0, 0, 255), (0, 0, 0)),
])
def test_pixels_become_rgb(mode, value, expected):
    image = Image.new(mode, (3, 2), value)
    if expected is None:
        with pytest.raises(ValueError):
            to_rgb(image)
    else:
        image = to_rgb(image)
        assert image.mode == 'RGB' and image.getpixel((1, 1)) == expected


def test_palettes_become_rgb(tmp_path):
    """With transparency in bytes, of which Pillow warns."""
    image = Image.new('P', (3, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / 'some.png', transparency=b'\0\x80')
    read = Image.open(tmp_path / 'some.png')
    assert all(to_rgb(one).getpixel((0, 0)) == (10, 20, 30) for one in (image, read, read.convert('PA')))


def png(width, height, body=b''):
    """A PNG file that says it has so many pixels."""
    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    chunks = ((b'IHDR', header), (b'IDAT', zlib.compress(body)), (b'IEND', b''))
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        for kind, data in chunks)


def test_images_that_cannot_be_read_are_replaced_and_named(tmp_path):
    """However many there are in a row, and whatever Pillow makes of them."""
    folder = write_images(tmp_path, num=30) / 'train' / 'class0'
    tiff = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tiff, 'TIFF')
    whole = (folder / '000.png').read_bytes()
    bad = {
        'a_empty.png': b'', 'b_text.png': b'no image', 'c_cut.png': whole[:-100], 'd_bomb.png': png(60_000, 60_000),
        'e_short.png': png(4, 4), 'f_float.png': tiff.getvalue(), 'g_eps.png': b'%!PS-Adobe-3.0 EPSF-3.0\n',
        'h_ppm.png': b'P6 -4 4 255\n', 'i_dds.png': b'DDS ' + 200 * b'\1'}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    (folder / os.fsdecode(b'l_\xff\x1b[2J.png')).write_bytes(b'')
    os.mkfifo(folder / 'j_pipe.png')
    (folder / 'k_link.png').symlink_to('nothing')
    data = samples(tmp_path)
    names = set()
    for i in range(len(data)):
        sample, unreadable = data[i]
        assert sample['images'].shape == (3, 64, 64)
        names.update(name.split(' (')[0] for name in unreadable)
    assert names == {f'class0/{name}' for name in (*bad, 'j_pipe.png', 'k_link.png', r'l_\udcff\x1b[2J.png')}
    first = [data[i][0]['images'] for i in (15, 16)]
    assert all(torch.equal(data[i][0]['images'], image) for i, image in zip((15, 16), first))


def test_folders_are_read_once_however_many_links_lead_to_them(tmp_path):
    write_images(tmp_path)
    before = fingerprint(open_dataset('', tmp_path, 'train'))
    for name, target in (('above', '..'), ('itself', '.'), ('class0/up', '..'), ('class1/other', '../class0')):
        (tmp_path / 'train' / name).symlink_to(target)
    dataset = open_dataset('', tmp_path, 'train')
    assert len({os.path.realpath(path) for path, _ in dataset.samples}) == len(dataset) == 10
    assert fingerprint(dataset) == before


def test_changed_data_are_known_and_moved_ones_are_the_same(tmp_path):
    seen = {fingerprint(open_dataset('', write_images(tmp_path / 'some'), 'train'))}
    (tmp_path / 'some').rename(tmp_path / 'moved')
    folder = tmp_path / 'moved' / 'train' / 'class0'

    def pack():
        with tarfile.open(tmp_path / 'all.tar', 'w') as tar:
            tar.add(tmp_path / 'moved', 'moved')
        return open_dataset('', tmp_path / 'all.tar', 'train')

    for change in (lambda: None, lambda: (folder / '000.png').rename(folder / '001.png'),
                   lambda: (folder / '001.png').unlink(), lambda: (folder / '002.png').write_bytes(b'other')):
        change()
        seen |= {fingerprint(open_dataset('', tmp_path / 'moved', 'train')), fingerprint(pack())}
    assert len(seen) == 8 and all('0 images' in text or '9 images' in text for text in seen)


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('', None, 'There is no --data-dir: name the folder or tar file'),
    ('nowhere', None, 'There is no --data-dir .*nowhere: name the folder'),
    ('some.tar', b'no tar', '--data-dir .*some.tar cannot be used'),
    ('some.png', b'no tar', '--data-dir .*some.png cannot be used'),
    ('pipe.tar', None, 'not a regular file'),
    ('empty', None, 'no name in it ends in .png, .jpg'),
])
def test_data_that_cannot_be_used_are_told(name, content, message, tmp_path):
    (tmp_path / 'empty').mkdir()
    os.mkfifo(tmp_path / 'pipe.tar')
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_dataset('', tmp_path / name if name else None, 'train')
    with pytest.raises(ValueError, match='--dataset torch/nosuch cannot be used'):
        open_dataset('torch/nosuch', tmp_path, 'train')

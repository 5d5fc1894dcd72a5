"""COCO-format data: what a sample is, the augmentation, and bad input, which ends in one sentence."""
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from support.coco import write_coco

from timm_itpn.detection.data import MAX_SIDE, SIDES, CocoDataset, eval_transforms, read_coco, train_transforms
from timm_itpn.engine.data import Replacing

SMALL = dict(short_sides=(64, 80), max_side=128, crop_short_sides=(72,), crop_sides=(40, 60))


@pytest.fixture
def path(tmp_path):
    return write_coco(tmp_path)


def dataset(path, transforms=None):
    return CocoDataset(path, path.parent, transforms or eval_transforms())


def changed(path, change):
    """Apply `change` to the content of the JSON file."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


def test_sample_is_what_torchvision_takes(path):
    data = dataset(path)
    image, target = data[1]
    assert len(data) == 2 and data.num_classes == 11
    assert image.shape == (3, 64, 96) and image.dtype == torch.float32 and 0.9 < image.max() <= 1
    assert {key: (value.dtype, tuple(value.shape)) for key, value in target.items()} == {
        'boxes': (torch.float32, (2, 4)), 'labels': (torch.int64, (2,)), 'masks': (torch.uint8, (2, 64, 96)),
        'image_id': (torch.int64, ()), 'seed': (torch.int64, ())}
    for (left, top, right, bottom), mask in zip(target['boxes'].int().tolist(), target['masks']):
        assert mask.sum() == mask[top:bottom, left:right].sum() > 0  # the box is around the mask
        assert image[:, mask.bool()].min() == 1  # which is where the digit is drawn


def test_gaps_in_category_ids_are_closed(path):
    data = dataset(path)
    rows = [row for row in data.coco.dataset['annotations'] if row['image_id'] == 1]
    assert [data.category_ids[label - 1] for label in data[0][1]['labels']] == [row['category_id'] for row in rows]


def test_random_numbers_follow_from_seed_epoch_and_index(path):
    data, again = (Replacing(dataset(path, train_transforms(**SMALL)), seed=1) for _ in range(2))
    state = torch.get_rng_state()
    image, target = data[0][0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again[1]  # another in between
    (same, also), _ = again[0]
    assert torch.equal(image, same) and all(torch.equal(target[key], also[key]) for key in target)
    sizes, seeds = set(), set()
    for data.epoch in range(30):
        (image, target), _ = data[0]
        seeds.add(int(target['seed']))
        sizes.add(tuple(image.shape[1:]))
        height, width = image.shape[1:]
        assert min(height, width) <= 80 and max(height, width) <= 128
        assert len(target['boxes']) == len(target['labels']) == len(target['masks'])
        assert target['masks'].shape[1:] == (height, width)
        assert (target['boxes'] >= 0).all() and (target['boxes'] <= torch.tensor([width, height] * 2)).all()
        assert (target['boxes'][:, 2:] - target['boxes'][:, :2] >= 1).all()
    assert len(sizes) > 10 and len(seeds) == 30


def test_sizes_of_the_augmentation_are_the_authors():
    resize, crop = train_transforms(max_side=MAX_SIDE, **SIDES).transforms[1].transforms
    assert resize.min_size == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800] and resize.max_size == 1333
    first, cut, last = crop.transforms
    assert first.min_size == [400, 500, 600] and first.max_size is None
    assert cut.keywords == dict(smallest=384, largest=600) and last is resize


def test_images_without_annotations_are_background(path, caplog):
    def change(data):
        data['annotations'] = [row for row in data['annotations'] if row['image_id'] == 1]
    with caplog.at_level(logging.INFO):
        data = dataset(changed(path, change), train_transforms(**SMALL))
    assert '1 of 2 images have no annotation: they are all background.' in caplog.text
    targets = data.collate([data[0], data[1]])['targets']
    assert targets[1]['boxes'].shape == (0, 4) and targets[1]['masks'].shape[0] == len(targets[1]['labels']) == 0


def test_crowds_are_left_to_the_evaluation(path):
    data = dataset(changed(path, lambda data: data['annotations'][0].update(iscrowd=1)))
    assert len(data[0][1]['boxes']) == 1 and len(data.coco.anns) == 4


@pytest.mark.parametrize(('name', 'told'), [('no.png', 'no.png'), ('\x1b[2J\udcff.png', r'\x1b[2J\udcff.png')])
def test_missing_images_are_skipped_and_counted(name, told, path, caplog):
    data = dataset(changed(path, lambda data: data['images'][0].update(file_name=name)))
    assert data.ids == [2]
    assert caplog.messages == [f'Skipped 1 of 2 images, which are missing, such as {path.parent}/{told}.']


@pytest.mark.parametrize('change, reason', [
    (dict(bbox=[4, 4, 0, 10]), 'a box of no area'),
    (dict(bbox=[4, 4, 8, -10]), 'a box of no area'),
    (dict(bbox=[200, 4, 8, 8]), 'a box outside of the image'),
    (dict(bbox=[4, 4, 8]), 'a box that is not four numbers'),
    (dict(bbox=[4, 4, 8, float('nan')]), 'a box that is not four numbers'),
    (dict(segmentation=[]), 'no usable segmentation'),
    (dict(segmentation=None), 'no usable segmentation'),
    (dict(segmentation=[[1, 2, 3, 4]]), 'no usable segmentation'),
    (dict(segmentation=dict(size=[64, 64], counts='0')), 'no usable segmentation'),
    (dict(segmentation=dict(size=[64, 96], counts=[1, 2])), 'no usable segmentation'),
    (dict(segmentation=dict(size=[64, 96], counts='')), 'no usable segmentation'),
])
def test_annotations_of_no_use_are_left_out_and_counted(path, change, reason, caplog):
    coco = read_coco(changed(path, lambda data: data['annotations'][1].update(change)))
    assert sorted(coco.anns) == [1, 3, 4]
    assert caplog.messages == [f'Left out 1 of 4 annotations of {path}: 1 with {reason}.']


def test_area_is_filled_in(path):
    coco = read_coco(changed(path, lambda data: data['annotations'][0].update(area=7)))
    assert coco.anns[1]['area'] == 7
    assert coco.anns[2]['area'] == coco.annToMask(coco.anns[2]).sum()


def first_image(**kwargs):
    return lambda data: data['images'][0].update(kwargs)


def first_annotation(**kwargs):
    return lambda data: data['annotations'][0].update(kwargs)


@pytest.mark.parametrize('change, message', [
    (lambda data: data.pop('categories'), "is not in COCO format: it has no list 'categories'."),
    (lambda data: data.update(annotations={}), "is not in COCO format: it has no list 'annotations'."),
    (lambda data: data['images'].clear(), "has no images: its list 'images' is empty."),
    (lambda data: data['images'].append(7), "'id' of entry 2 of 'images' is missing or of a wrong type."),
    (first_image(height='64'), "'height' of entry 0 of 'images' is missing or of a wrong type."),
    (first_image(id=2), "two entries of 'images' have the id 2."),
    (first_annotation(image_id=9), "annotation 1 has the image_id 9, which is not in 'images'."),
    (first_annotation(category_id=4), "annotation 1 has the category_id 4, which is not in 'categories'."),
    (first_annotation(category_id=[3]), "'category_id' of entry 0 of 'annotations' is missing or of a wrong type."),
])
def test_file_that_is_not_coco_is_one_sentence(path, change, message):
    with pytest.raises(ValueError) as error:
        read_coco(changed(path, change))
    assert str(error.value).startswith(str(path)) and str(error.value).endswith(message)


@pytest.mark.parametrize('content, message', [
    (None, 'cannot be read as JSON: .*No such file'),
    (b'', 'cannot be read as JSON: Expecting value'),
    (b'{"images": [', 'cannot be read as JSON: Expecting value'),
    (b'\xff\xd8\xff', 'cannot be read as JSON:'),
    (b'[' * 100_000, 'cannot be read as JSON:'),
    (b'[]', "is not in COCO format: it has no list 'images'."),
])
def test_file_that_is_not_json_is_one_sentence(tmp_path, content, message):
    path = tmp_path / 'instances.json'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f'{path.name} {message}'.replace('[', r'\[')) as error:
        read_coco(path)
    assert '\n' not in str(error.value)


def test_folder_of_other_images_is_refused(path, tmp_path_factory):
    with pytest.raises(ValueError, match='has none of the images of .*: name the folder that they are in'):
        CocoDataset(path, tmp_path_factory.mktemp('other'), eval_transforms())


def test_images_of_16_bits_keep_their_greys(path):
    data = dataset(path)
    grey = np.arange(64 * 96, dtype=np.uint16).reshape(64, 96) * 10
    Image.fromarray(grey).save(path.parent / '0001.png')
    data.transforms = eval_transforms()
    torch.testing.assert_close(data[0][0][1] * 255, torch.from_numpy(grey >> 8).float())


def test_images_that_cannot_be_used_are_named(path):
    data = dataset(path)
    Image.new('RGB', (64, 96)).save(path.parent / '0001.png')
    with pytest.raises(RuntimeError, match='0001.png has 64 x 96 pixels, but its annotations are for 96 x 64'):
        data[0]
    content = (path.parent / '0002.png').read_bytes()
    for broken in (b'', content[:200], content[:len(content) // 2]):
        (path.parent / '0002.png').write_bytes(broken)
        sample, (name,) = Replacing(data, num_others=0)[1]
        assert sample is None and name.startswith('0002.png (')

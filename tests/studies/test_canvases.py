"""Digits on textures: what is drawn is what the labels say."""
import torch
import torch.nn.functional as F

from timm_itpn.studies.canvases import draw, load_digits


def test_training_and_test_digits_are_all_digits():
    (train, train_labels), (test, test_labels) = load_digits(test=False), load_digits(test=True)
    assert len(train) + len(test) == 1797 and len(test) == 360
    assert train.shape[1:] == (8, 8) and 0 <= train.min() and train.max() == 1
    assert set(train_labels.tolist()) == set(test_labels.tolist()) == set(range(10))
    both = [{tuple(digit.flatten().tolist()) for digit in digits} for digits in (train, test)]
    assert not set.intersection(*both)


def test_canvases_are_as_their_labels_say():
    digits, labels = load_digits(test=True)
    canvases = draw(digits, labels, num=20, side=128, copies=2, seed=0)
    assert canvases.images.shape == (20, 3, 128, 128) and canvases.images.dtype == torch.uint8
    assert canvases.token_labels.shape == (20, 8, 8)
    assert torch.equal(canvases.labels, labels[:20])
    brightness = F.avg_pool2d(canvases.images.float().mean(dim=1), 16)
    for i in range(20):
        here = canvases.token_labels[i]
        assert set(here.unique().tolist()) <= {0, 1, 2 + int(labels[i])}
        ink = here == 2 + labels[i]
        assert 0 < ink.sum() < 40
        assert brightness[i][ink].mean() > 1.2 * brightness[i][~ink].mean()


def test_the_seed_decides():
    digits, labels = load_digits(test=True)
    first, again, other = (draw(digits, labels, num=2, side=64, copies=1, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first.images, other.images)


def test_plain_ground_has_one_colour_and_labels_may_be_fine():
    digits, labels = load_digits(test=True)
    canvases = draw(digits, labels, num=20, side=64, copies=1, seed=0, sizes=(56, 65), stride=4, plain=True)
    assert canvases.token_labels.shape == (20, 16, 16)
    for image, label, here in zip(canvases.images, canvases.labels, canvases.token_labels):
        assert set(here.unique().tolist()) == {0, 2 + int(label)}
        brightness = image.float().mean(dim=0)
        ground = brightness.min()
        assert (brightness == ground).float().mean() > 0.2
        ink = here == 2 + label
        assert F.avg_pool2d(brightness[None], 4)[0][ink].mean() > 1.2 * ground

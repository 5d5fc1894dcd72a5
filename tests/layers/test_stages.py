"""Stages on the CPU work on a few rows of maps at a time, which nobody should notice."""
import pytest
import torch
from support.small import images, small_model

import timm_itpn
from timm_itpn.layers import parts


@pytest.fixture
def seen(monkeypatch):
    """Lengths of what the first block of stage 1 sees; an image of the small models is one part, of 16 rows."""
    monkeypatch.setattr(parts, 'PART_SIZE', 16 * 16 * 32)
    model = small_model('fast_itpn_tiny', num_classes=0)
    batches = []
    model.stages[0].blocks[0].register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    return model, batches


def test_parts_give_what_the_whole_does(seen, monkeypatch):
    model, batches = seen
    x = images(5, 3, 64, 64)
    with torch.no_grad():
        single = model(x)
        assert batches == [16] * 5
        monkeypatch.setattr(parts, 'PART_SIZE', 2 * 16 * 16 * 32 + 1)
        pairs = model(x)
        assert batches[5:] == [32, 32, 16]
        monkeypatch.setattr(parts, 'PART_SIZE', 2 ** 40)
        whole = model(x)
        assert batches[8:] == [5]
    torch.testing.assert_close(single, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pairs, whole, rtol=1e-5, atol=1e-6)


def test_training_is_whole(seen):
    model, batches = seen
    model(images(5, 3, 64, 64)).sum().backward()
    assert batches == [5]


def test_traced_model_takes_other_batches(seen):
    model, _ = seen
    with torch.no_grad():
        traced = torch.jit.trace(model, images(2, 3, 64, 64))
        x = images(3, 3, 64, 64)
        torch.testing.assert_close(traced(x), model(x), rtol=1e-5, atol=1e-6)


def test_empty_batch_passes(seen):
    model, _ = seen
    with torch.no_grad():
        for each in (model, timm_itpn.fuse(model)):
            assert each(torch.zeros(0, 3, 64, 64)).shape == (0, 128)

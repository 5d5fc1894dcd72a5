"""Stages on the CPU work on a few rows of maps at a time, which nobody should notice."""
import pytest
import torch
from support.small import FAMILIES, PYRAMIDS, images, small_model

import timm_itpn
from timm_itpn.layers import run


@pytest.mark.parametrize('fused', [False, True], ids=['model', 'fused'])
@pytest.mark.parametrize('name', [*FAMILIES, *PYRAMIDS])
def test_rows_at_a_time_give_what_the_whole_does(name, fused, monkeypatch):
    model = small_model(name, num_classes=0, features_only=name in PYRAMIDS)
    model = timm_itpn.fuse(model) if fused else model
    x = images(5, 3, 64, 64)
    with torch.no_grad():
        whole = model(x)
        for size in (1, 16 * 16 * 32, 2 * 16 * 16 * 32 + 1):
            monkeypatch.setattr(run, 'SLICE_SIZE', size)
            torch.testing.assert_close(model(x), whole, rtol=1e-5, atol=1e-5)
        empty = model(x[:0])
    assert all(len(level) == 0 for level in (empty if name in PYRAMIDS else [empty]))

"""Objectives of pixels."""
import numpy as np
import torch

from timm_itpn.pretrain.pixel import sincos_pos_embed


def test_fixed_position_embedding_follows_the_definition():
    height, width, dim = 3, 5, 16
    positions = sincos_pos_embed((height, width), dim)
    frequencies = 10000. ** (-np.arange(dim // 4) / (dim // 4))
    for y in range(height):
        for x in range(width):
            expected = np.concatenate([f(p * frequencies) for p in (x, y) for f in (np.sin, np.cos)])
            actual = positions[0, y * width + x].double()
            torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=0, atol=1e-6)

"""Positions of images as trackers make them, and what a token of a template stands for."""
import pytest
import torch
from support.small import small_model

from timm_itpn.tracking.embeddings import foreground_share, role_pos_embed


@pytest.mark.parametrize(('method', 'size', 'expected'), [
    ('crop', (2, 3), [[0, 1, 2], [4, 5, 6]]),
    ('crop', (4, 7), [[4 * y + x for x in (0, .40625, 1, 1.5, 2, 2.59375, 3)] for y in range(4)]),  # the border repeats
    ('corners', (3, 3), [[6 * y + 1.5 * x for x in range(3)] for y in range(3)]),
])
def test_positions_are_made_as_trackers_do(method, size, expected):
    grid = torch.arange(16.).reshape(1, 16, 1)  # 4 * row + column
    found = role_pos_embed(grid, size, (4, 4), method)
    torch.testing.assert_close(found.flatten(), torch.tensor(expected).float().flatten())
    assert torch.equal(role_pos_embed(grid, (4, 4), (4, 4), method), grid)


def test_half_pixel_positions_are_those_of_a_model_of_that_size():
    stage = small_model('fast_itpn_tiny').stages[2]
    found = role_pos_embed(stage.pos_embed, (3, 5), (4, 4), 'half_pixel')
    stage.set_grid_size((3, 5))
    assert torch.equal(found, stage.pos_embed)
    with pytest.raises(ValueError, match="positions 'nearest' is unknown, use one of .*crop"):
        role_pos_embed(found, (4, 4), (3, 5), 'nearest')


def test_share_of_foreground_is_counted_in_pixels():
    boxes = torch.tensor([[0.27, 0.24, 0.46, 0.52], [0.3, -0.1, 0.9, 0.35], [0.5, 0.5, 0., 0.]], dtype=torch.float64)
    for (left, top, width, height), share in zip(boxes.tolist(), foreground_share(boxes, 48, 112)):
        pixels = torch.tensor([
            [left * 112 <= x < left * 112 + width * 112 and top * 48 <= y < top * 48 + height * 48 for x in range(112)]
            for y in range(48)]).double()
        assert torch.equal(share.reshape(3, 7), torch.nn.functional.avg_pool2d(pixels[None], 16)[0])

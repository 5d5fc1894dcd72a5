"""Windows of grids whose sides need not divide."""
import itertools

import pytest
import torch

from timm_itpn.acceleration.windows import is_padded, num_windows, partition, smallest_window, window_positions

GRIDS = [(14, 14, 7), (14, 14, 5), (13, 9, 4), (50, 84, 16), (5, 5, 8), (7, 3, 1), (1, 1, 16), (6, 10, 0)]
CPU = torch.device('cpu')


def sides(side, window):
    """Lengths of the windows along a side."""
    count = num_windows(side, window)
    ends = [i * side // count for i in range(count + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


@pytest.mark.parametrize(('height', 'width', 'window'), GRIDS)
def test_every_token_is_in_one_window(height, width, window):
    positions = window_positions(height, width, window, CPU)
    real = positions < height * width
    assert sorted(positions[real].tolist()) == list(range(height * width))
    assert (positions[~real] == height * width).all()
    assert is_padded(height, width, window) == (not real.all())


@pytest.mark.parametrize(('height', 'width', 'window'), GRIDS)
def test_windows_are_rectangles_that_differ_by_at_most_one(height, width, window):
    heights, widths = sides(height, window), sides(width, window)
    for lengths in (heights, widths):
        assert max(lengths) - min(lengths) <= 1
        assert window == 0 or max(lengths) <= window
    positions = window_positions(height, width, window, CPU)
    assert positions.shape == (len(heights) * len(widths), max(heights) * max(widths))
    grid = torch.arange(height * width).reshape(height, width)
    rows = grid.split(heights)
    wanted = [part.flatten().tolist() for row in rows for part in row.split(widths, dim=1)]
    actual = [[position for position in window.tolist() if position < height * width] for window in positions]
    assert actual == wanted  # raster order, padded positions last
    assert [sorted(window.tolist()) == window.tolist() for window in positions] == [True] * len(positions)
    assert smallest_window(height, width, window) == min(map(len, wanted))


def test_no_window_is_the_whole_grid():
    assert window_positions(3, 4, 0, CPU).tolist() == [list(range(12))]
    assert num_windows(100, 0) == 1


def test_partition_brings_tokens_to_their_windows():
    x = torch.arange(5 * 3 * 2.).reshape(1, 15, 2)
    positions = window_positions(5, 3, 2, CPU)
    parts = partition(x, positions)
    assert parts.shape == (1, 6, 4, 2)
    real = positions < 15
    assert torch.equal(parts[0][real], x[0, positions[real]])
    assert parts.isfinite().all()

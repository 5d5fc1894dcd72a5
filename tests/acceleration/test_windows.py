"""Windows of grids whose sides need not divide."""
import itertools

import pytest
import torch

from timm_itpn.acceleration.windows import is_padded, num_windows, partition, smallest_window, window_places

GRIDS = [(14, 14, 7), (14, 14, 5), (13, 9, 4), (50, 84, 16), (5, 5, 8), (7, 3, 1), (1, 1, 16), (6, 10, 0)]
CPU = torch.device('cpu')


def sides(side, window):
    """Lengths of the windows along a side."""
    count = num_windows(side, window)
    ends = [i * side // count for i in range(count + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


@pytest.mark.parametrize(('height', 'width', 'window'), GRIDS)
def test_every_token_is_in_one_window(height, width, window):
    places = window_places(height, width, window, CPU)
    real = places < height * width
    assert sorted(places[real].tolist()) == list(range(height * width))
    assert (places[~real] == height * width).all()
    assert is_padded(height, width, window) == (not real.all())


@pytest.mark.parametrize(('height', 'width', 'window'), GRIDS)
def test_windows_are_rectangles_that_differ_by_at_most_one(height, width, window):
    heights, widths = sides(height, window), sides(width, window)
    for lengths in (heights, widths):
        assert max(lengths) - min(lengths) <= 1
        assert window == 0 or max(lengths) <= window
    places = window_places(height, width, window, CPU)
    assert places.shape == (len(heights) * len(widths), max(heights) * max(widths))
    grid = torch.arange(height * width).reshape(height, width)
    rows = grid.split(heights)
    wanted = [part.flatten().tolist() for row in rows for part in row.split(widths, dim=1)]
    actual = [[place for place in window.tolist() if place < height * width] for window in places]
    assert actual == wanted  # raster order, padded places last
    assert [sorted(window.tolist()) == window.tolist() for window in places] == [True] * len(places)
    assert smallest_window(height, width, window) == min(map(len, wanted))


def test_no_window_is_the_whole_grid():
    assert window_places(3, 4, 0, CPU).tolist() == [list(range(12))]
    assert num_windows(100, 0) == 1


def test_partition_brings_tokens_to_their_windows():
    x = torch.arange(5 * 3 * 2.).reshape(1, 15, 2)
    places = window_places(5, 3, 2, CPU)
    parts = partition(x, places)
    assert parts.shape == (1, 6, 4, 2)
    real = places < 15
    assert torch.equal(parts[0][real], x[0, places[real]])
    assert parts.isfinite().all()

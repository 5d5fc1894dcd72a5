"""Windows of grids whose sides need not divide; what queries see in them, and what gathering tokens stand for."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from timm_itpn.acceleration.windows import (
    attention_bias,
    gathering_bias,
    is_padded,
    num_windows,
    partition,
    smallest_window,
    window_heads,
    window_mean,
    window_positions,
)

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


# gathering

def random_tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_gathering_tokens_are_means_without_padding():
    x = random_tokens(2, 3, 4, 8)
    torch.testing.assert_close(window_mean(x), x.mean(dim=2))
    real = torch.tensor([[[True] * 4, [True] * 3 + [False], [True] * 2 + [False] * 2]])
    actual = window_mean(x, real)
    for window, count in enumerate((4, 3, 2)):
        torch.testing.assert_close(actual[:, window], x[:, window, :count].mean(dim=1))


def test_gathering_tokens_stand_for_what_a_query_does_not_see():
    torch.testing.assert_close(
        gathering_bias(torch.tensor([4, 6, 3])).exp(), torch.tensor([[0., 6., 3.], [4., 0., 3.], [4., 6., 0.]]))


def test_equal_tokens_make_gathering_exact():
    """If all tokens of a window are equal, a key with the logarithm of their number is as good as all of them."""
    positions = window_positions(4, 6, 3, CPU)  # 2 x 2 windows of 2 x 3
    W, P = positions.shape
    kv = random_tokens(1, W, 1, 2, 2, 8).expand(-1, -1, P, -1, -1, -1)
    qkv = torch.cat((random_tokens(1, W, P, 1, 2, 8), kv), dim=3)
    wanted = F.scaled_dot_product_attention(*window_heads(qkv.flatten(1, 2)[:, None]))  # (1, heads, W * P, 8)
    bias = attention_bias(positions[None], None, gathering_bias(torch.full((W,), P)))
    q, k, v = window_heads(qkv, window_mean(qkv[:, :, :, 1:]))
    actual = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.double().flatten(0, 1))
    torch.testing.assert_close(actual.transpose(0, 1).flatten(1, 2)[None], wanted, rtol=1e-6, atol=1e-6)


def test_padded_keys_are_not_seen():
    positions = window_positions(3, 3, 2, CPU)[None]  # windows of 1, 2, 2 and 4 tokens
    bias = attention_bias(positions, positions < 9, gathering_bias((positions < 9).sum(dim=2)[0]))
    assert bias.shape == (1, 4, 1, 1, 4 + 4)
    assert ((bias[:, :, 0, 0, :4] == -math.inf) == (positions == 9)).all()
    together = positions.flatten(1)[:, None]
    bias = attention_bias(together, together < 9, None)
    assert ((bias[:, :, 0, 0] == -math.inf) == (together == 9)).all()


def test_no_bias_where_there_is_nothing_to_add():
    positions = torch.arange(4).reshape(1, 1, 4)
    assert attention_bias(positions, None, None) is None


def test_positions_follow_keys():
    """Positions are put through the same functions as tokens, so they cannot get out of step."""
    positions = window_positions(3, 4, 2, CPU)[None]
    W, K = positions.shape[1:]
    qkv = positions.reshape(1, W, K, 1, 1, 1).expand(-1, -1, -1, 3, 1, 1)
    for nowhere in (None, torch.full((1, W, 2, 1, 1), 12)):
        q, k, v = window_heads(qkv, nowhere)
        assert torch.equal(q.flatten(1), positions[0]) and torch.equal(v, k)
        keys = positions[0] if nowhere is None else F.pad(positions[0], (0, W), value=12)
        assert torch.equal(k.flatten(1), keys)
    for x in window_heads(qkv.flatten(1, 2)[:, None]):
        assert torch.equal(x.flatten(), positions.flatten())

"""What queries see in windows, and what gathering tokens stand for."""
import math

import torch
import torch.nn.functional as F

from timm_itpn.acceleration.gathering import (
    attention_bias,
    gathering_bias,
    window_heads,
    window_mean,
)
from timm_itpn.acceleration.windows import window_positions

CPU = torch.device('cpu')


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
    bias = attention_bias(positions[None], 24, gathering_bias(torch.full((W,), P)), padded=False, windowed=True)
    q, k, v = window_heads(qkv, window_mean(qkv[:, :, :, 1:]))
    actual = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.double().flatten(0, 1))
    torch.testing.assert_close(actual.transpose(0, 1).flatten(1, 2)[None], wanted, rtol=1e-6, atol=1e-6)


def test_padded_keys_are_not_seen():
    positions = window_positions(3, 3, 2, CPU)[None]  # windows of 1, 2, 2 and 4 tokens
    bias = attention_bias(positions, 9, gathering_bias((positions < 9).sum(dim=2)[0]), padded=True, windowed=True)
    assert bias.shape == (1, 4, 1, 1, 4 + 4)
    assert ((bias[:, :, 0, 0, :4] == -math.inf) == (positions == 9)).all()
    bias = attention_bias(positions, 9, None, padded=True, windowed=False)
    assert ((bias[0, 0, 0, 0] == -math.inf) == (positions.flatten() == 9)).all()


def test_no_bias_where_there_is_nothing_to_add():
    positions = torch.arange(4).reshape(1, 1, 4)
    assert attention_bias(positions, 4, None, padded=False, windowed=True) is None
    positions = torch.arange(4).reshape(1, 2, 2)
    assert attention_bias(positions, 4, torch.zeros(2, 2), padded=False, windowed=False) is None


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

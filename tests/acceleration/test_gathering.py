"""What queries see in windows, and what gathering tokens stand for."""
import math

import pytest
import torch
import torch.nn.functional as F

from timm_itpn.acceleration.gathering import (
    FORMS,
    attention_bias,
    gathering_bias,
    global_heads,
    key_places,
    query_places,
    window_heads,
    window_mean,
)
from timm_itpn.acceleration.windows import window_places

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


def test_mean_heads_are_without_padding():
    qkv = random_tokens(2, 3, 4, 3, 2, 8)
    torch.testing.assert_close(window_mean(qkv[:, :, :, 1:]), qkv[:, :, :, 1:].mean(dim=2))
    real = torch.tensor([[[True] * 4, [True] * 3 + [False], [True] * 2 + [False] * 2]])
    actual = window_mean(qkv[:, :, :, 1:], real)
    for window, count in enumerate((4, 3, 2)):
        torch.testing.assert_close(actual[:, window], qkv[:, window, :count, 1:].mean(dim=1))


@pytest.mark.parametrize('form', FORMS)
def test_equal_tokens_make_gathering_exact(form):
    """If all tokens of a window are equal, a key with the logarithm of their number is as good as all of them."""
    places = window_places(4, 6, 3, CPU)  # 2 x 2 windows of 2 x 3
    W, P = places.shape
    kv = random_tokens(1, W, 1, 2, 2, 8).expand(-1, -1, P, -1, -1, -1)
    q = random_tokens(1, W, P, 1, 2, 8)
    qkv = torch.cat((q, kv), dim=3)
    wanted = F.scaled_dot_product_attention(*global_heads(qkv, 0))  # (1, heads, W * P, 8)
    gathered = window_mean(qkv[:, :, :, 1:])
    G = FORMS.index(form)
    if G == 1:
        qkv = torch.cat((qkv[:, :, :1], qkv), dim=2)
        gathered = qkv[:, :, 0, 1:]
    bias = attention_bias(places[None], 24, gathering_bias(torch.full((W,), P)), padded=False, windowed=True)
    actual = F.scaled_dot_product_attention(*window_heads(qkv, G, gathered), attn_mask=bias.double().flatten(0, 1))
    actual = actual[:, :, G:].transpose(0, 1).flatten(1, 2)[None]
    torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)


def test_padded_keys_are_not_seen():
    places = window_places(3, 3, 2, CPU)[None]  # windows of 1, 2, 2 and 4 tokens
    bias = attention_bias(places, 9, gathering_bias((places < 9).sum(dim=2)[0]), padded=True, windowed=True)
    assert bias.shape == (1, 4, 1, 1, 4 + 4)
    assert ((bias[:, :, 0, 0, :4] == -math.inf) == (places == 9)).all()
    bias = attention_bias(places, 9, None, padded=True, windowed=False)
    assert ((bias[0, 0, 0, 0] == -math.inf) == (places.flatten() == 9)).all()


def test_no_bias_where_there_is_nothing_to_add():
    places = torch.arange(4).reshape(1, 1, 4)
    assert attention_bias(places, 4, None, padded=False, windowed=True) is None
    places = torch.arange(4).reshape(1, 2, 2)
    assert attention_bias(places, 4, torch.zeros(2, 2), padded=False, windowed=False) is None


def test_places_follow_queries_and_keys():
    """Places are put through the same functions as tokens, so they cannot get out of step."""
    places = window_places(3, 4, 2, CPU)[None]
    W, K = places.shape[1:]
    for num_gathering, gathers in ((0, False), (0, True), (1, True)):
        as_tokens = F.pad(places, (num_gathering, 0), value=12).reshape(1, W, -1, 1, 1, 1)
        qkv = as_tokens.expand(-1, -1, -1, 3, 1, 1)
        nowhere = torch.full((1, W, 2, 1, 1), 12) if gathers else None
        for windowed, (q, k, v) in (
                (True, window_heads(qkv, num_gathering, nowhere)), (False, global_heads(qkv, num_gathering))):
            assert torch.equal(q.flatten(1), query_places(places, 12, num_gathering, windowed)[0])
            assert torch.equal(k.flatten(1), key_places(places, 12, gathers, windowed)[0])
            assert torch.equal(v, k)

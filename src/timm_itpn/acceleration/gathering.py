"""Token gathering: a gathering token per window tells the other windows what is in it.

Tokens are (B, W, G + K, C): in each of W windows G gathering tokens, then K tokens. A query sees the tokens of its
window and the gathering tokens of the others, in one softmax. A gathering token stands for the tokens of its window:
its logit is raised by the logarithm of their number, as if each of them had its key. It has one of two forms:

    'mean': in every block anew, its key and value are the means of those of its window's tokens. G = 0.
    'token': a token that starts as the mean of its window's tokens and goes through the blocks like them. G = 1.
"""

import torch
import torch.nn.functional as F

__all__ = [
    'FORMS', 'attention_bias', 'gathering_bias', 'global_heads', 'key_places', 'query_places', 'window_heads',
    'window_mean']

FORMS = ('mean', 'token')


def window_mean(x: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of each window, (B, W, K, ...) -> (B, W, ...).

    Args:
        x: What the tokens of each window have.
        real: (1 or B, W, K), True where a place is not padded; None if none is.
    """
    if real is None:
        return x.mean(dim=2)
    weight = real.type_as(x) / real.sum(dim=2, keepdim=True)
    weight = weight.reshape(list(weight.shape) + [1] * (x.ndim - 3))
    return (x * weight).sum(dim=2)


def gathering_bias(num_tokens: torch.Tensor) -> torch.Tensor:
    """What is added to the logits of the gathering tokens.

    Args:
        num_tokens: (W,), tokens that are in each window.

    Returns:
        (W, W), float32: for queries of window i, the logarithm of the number of tokens that gathering token j stands
        for; -inf for that of the query's own window, whose tokens it sees.
    """
    own = torch.eye(num_tokens.shape[0], dtype=torch.bool, device=num_tokens.device)
    return num_tokens.float().log().masked_fill(own, float('-inf'))


def window_heads(
        qkv: torch.Tensor,
        num_gathering: int,
        gathered: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of attention in windows.

    Args:
        qkv: (B, W, G + K, 3, num_heads, head_dim).
        num_gathering: G.
        gathered: Keys and values of the gathering tokens (B, W, 2, num_heads, head_dim); None = windows see nothing of
            each other.

    Returns:
        q (B * W, num_heads, G + K, head_dim); k and v (B * W, num_heads, K + W, head_dim), or without the W.
    """
    W = qkv.shape[1]
    q, kv = qkv[:, :, :, 0], qkv[:, :, num_gathering:, 1:]
    if gathered is not None:
        kv = torch.cat((kv, gathered[:, None].expand(-1, W, -1, -1, -1, -1)), dim=2)
    k, v = kv.flatten(0, 1).permute(2, 0, 3, 1, 4).unbind(0)
    return q.flatten(0, 1).transpose(1, 2), k, v


def global_heads(qkv: torch.Tensor, num_gathering: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of attention among all tokens that have not left; gathering tokens only ask.

    Args:
        qkv: (B, W, G + K, 3, num_heads, head_dim).
        num_gathering: G.

    Returns:
        q (B, num_heads, W * (G + K), head_dim); k and v (B, num_heads, W * K, head_dim).
    """
    q = qkv[:, :, :, 0].flatten(1, 2).transpose(1, 2)
    k, v = qkv[:, :, num_gathering:, 1:].flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def attention_bias(
        places: torch.Tensor,
        num_tokens: int,
        gathering: torch.Tensor | None,
        padded: bool,
        windowed: bool,
) -> torch.Tensor | None:
    """What is added to the logits of the keys of `window_heads` or `global_heads`.

    Args:
        places: (1 or B, W, K), `num_tokens` where padded.
        num_tokens: Tokens of the whole grid.
        gathering: (W, W), as from `gathering_bias`; None without gathering tokens.
        padded: There are padded places.
        windowed: Attention is in windows.

    Returns:
        (1 or B, W, 1, 1, K + W) for windows, (1 or B, 1, 1, 1, W * K) otherwise, float32: queries are the fourth axis.
        None where nothing is to be added.
    """
    if not padded and (gathering is None or not windowed):
        return None
    bias = torch.zeros(places.shape, device=places.device).masked_fill(places == num_tokens, float('-inf'))
    if not windowed:
        bias = bias.flatten(1, 2)[:, None]
    elif gathering is not None:
        bias = torch.cat((bias, gathering.expand(bias.shape[0], -1, -1)), dim=-1)
    return bias[:, :, None, None]


def key_places(places: torch.Tensor, num_tokens: int, gathers: bool, windowed: bool) -> torch.Tensor:
    """Places of the keys: (1 or B, W, K + W) for windows, (1 or B, 1, W * K) otherwise; gathering tokens have none.

    Args:
        places: (1 or B, W, K).
        num_tokens: Tokens of the whole grid, which stands for no place.
        gathers: There are gathering tokens.
        windowed: Attention is in windows.
    """
    if not windowed:
        return places.flatten(1, 2)[:, None]
    return F.pad(places, (0, places.shape[1]), value=float(num_tokens)) if gathers else places


def query_places(places: torch.Tensor, num_tokens: int, num_gathering: int, windowed: bool) -> torch.Tensor:
    """Places of the queries: (1 or B, W, G + K) for windows, (1 or B, 1, W * (G + K)) otherwise. See `key_places`.

    Args:
        places: (1 or B, W, K).
        num_tokens: Tokens of the whole grid, which stands for no place.
        num_gathering: G.
        windowed: Attention is in windows.
    """
    places = F.pad(places, (num_gathering, 0), value=float(num_tokens))
    return places if windowed else places.flatten(1, 2)[:, None]

"""Token gathering: a gathering token per window tells the other windows what is in it.

Tokens are (B, W, K, C): K tokens in each of W windows. A query sees the tokens of its window and the gathering tokens
of the others, in one softmax. Key and value of a gathering token are the means over its window's tokens, made anew in
every block. It stands for the tokens of its window: its logit is raised by the logarithm of their number, as if each of
them had its key.
"""
import torch

from ..ops.attention import Heads

__all__ = ['attention_bias', 'gathering_bias', 'window_heads', 'window_mean']


def window_mean(x: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of each window, (B, W, K, ...) -> (B, W, ...).

    Args:
        x: What the tokens of each window have.
        real: (1 or B, W, K), True where a position is not padded; None if none is.
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
    window = torch.arange(num_tokens.shape[0], device=num_tokens.device)
    own = window[:, None] == window
    return num_tokens.float().log().masked_fill(own, float('-inf'))


def window_heads(qkv: torch.Tensor, gathering: torch.Tensor | None = None) -> Heads:
    """Queries, keys and values of attention in windows; among all tokens it is that in one window.

    Args:
        qkv: (B, W, K, 3, num_heads, head_dim).
        gathering: Keys and values of the gathering tokens (B, W, 2, num_heads, head_dim); None = windows see nothing of
            each other.

    Returns:
        q (B * W, num_heads, K, head_dim); k and v (B * W, num_heads, K + W, head_dim), or without the W.
    """
    W = qkv.shape[1]
    q, kv = qkv[:, :, :, 0], qkv[:, :, :, 1:]
    if gathering is not None:
        kv = torch.cat((kv, gathering[:, None].expand(-1, W, -1, -1, -1, -1)), dim=2)
    k, v = kv.flatten(0, 1).permute(2, 0, 3, 1, 4).unbind(0)
    return q.flatten(0, 1).transpose(1, 2), k, v


def attention_bias(
        positions: torch.Tensor,
        num_tokens: int,
        gathering: torch.Tensor | None,
        padded: bool,
        windowed: bool,
) -> torch.Tensor | None:
    """What is added to the logits of the keys of `window_heads`.

    Args:
        positions: (1 or B, W, K), `num_tokens` where padded.
        num_tokens: Tokens of the whole grid.
        gathering: (W, W), as from `gathering_bias`; None without gathering tokens.
        padded: There are padded positions.
        windowed: Attention is in windows.

    Returns:
        (1 or B, W, 1, 1, K + W) for windows, (1 or B, 1, 1, 1, W * K) otherwise, float32: queries are the fourth axis.
        None where nothing is to be added.
    """
    if not padded and (gathering is None or not windowed):
        return None
    bias = torch.zeros(positions.shape, device=positions.device).masked_fill(positions == num_tokens, float('-inf'))
    if not windowed:
        bias = bias.flatten(1, 2)[:, None]
    elif gathering is not None:
        bias = torch.cat((bias, gathering.expand(bias.shape[0], -1, -1)), dim=-1)
    return bias[:, :, None, None]

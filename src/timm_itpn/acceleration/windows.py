"""Windows of a grid of tokens, and token gathering, which tells each window what is in the others.

Sides need not divide: the windows of a side differ by at most one token. All are stored with as many positions as the
largest has; a smaller one has its padded positions last. A token's position is its index on the grid, row-major; padded
ones have the number of tokens as position, one beyond the last.

Tokens are (B, W, K, C): K tokens in each of W windows. A query sees the tokens of its window and the gathering tokens
of the others, in one softmax. Key and value of a gathering token are the means over its window's tokens, made anew in
every block. It stands for the tokens of its window: its logit is raised by the logarithm of their number, as if each of
them had its key.
"""
import torch

from ..ops.attention import Heads


def num_windows(side: int, window: int) -> int:
    """Windows along a side of `side` tokens, none wider than `window` tokens; 0 = one window, whatever the side."""
    return 1 if window == 0 else (side + window - 1) // window


def smallest_window(height: int, width: int, window: int) -> int:
    """Number of tokens in the smallest window of a height x width grid."""
    return (height // num_windows(height, window)) * (width // num_windows(width, window))


def is_padded(height: int, width: int, window: int) -> bool:
    """True if some windows of a height x width grid are smaller than others."""
    return height % num_windows(height, window) + width % num_windows(width, window) > 0


def window_positions(height: int, width: int, window: int, device: torch.device) -> torch.Tensor:
    """Places of the tokens of each window.

    Args:
        height: Of the grid, in tokens.
        width: Of the grid, in tokens.
        window: Largest side of a window, in tokens; 0 for one window.
        device: Of the result.

    Returns:
        (W, P), int64: for each of W windows, row-major, its tokens in raster order, then height * width where padded.
    """
    top, rows = _spans(height, num_windows(height, window), device)
    left, columns = _spans(width, num_windows(width, window), device)
    num_rows, num_columns = -(-height // len(top)), -(-width // len(left))  # of the largest window
    rank = torch.arange(num_rows * num_columns, device=device)
    y = rank // columns[:, None]  # (window columns, P)
    x = rank - y * columns[:, None]
    positions = (top[:, None, None] + y) * width + left[:, None] + x  # (window rows, window columns, P)
    return positions.masked_fill(y >= rows[:, None, None], height * width).flatten(0, 1)


def _spans(side: int, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """First token and length of each of `count` parts of a side."""
    ends = torch.arange(count + 1, device=device) * side // count
    return ends[:-1], ends[1:] - ends[:-1]


def partition(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Bring tokens (B, N, C) into windows (B, W, P, C), by the positions (W, P) of each.

    Padded positions get the last token; nothing may look at it.
    """
    B, N, C = x.shape
    x = x.index_select(1, positions.flatten().clamp(max=N - 1))
    return x.reshape(B, positions.shape[0], positions.shape[1], C)


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
        gathering: Keys and values of the gathering tokens (B, W, 2, num_heads, head_dim); None = there are none.

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
        real: torch.Tensor | None,
        gathering: torch.Tensor | None,
) -> torch.Tensor | None:
    """What is added to the logits of the keys of `window_heads`.

    Args:
        positions: (1 or B, W, K), of the tokens on the grid.
        real: (1 or B, W, K), True where a position is not padded; None if none is.
        gathering: (W, W), as from `gathering_bias`; None without gathering tokens.

    Returns:
        (1 or B, W, 1, 1, K + W), or without the W, float32: queries are the fourth axis. None where nothing is to be
        added.
    """
    if gathering is None and real is None:
        return None
    bias = torch.zeros(positions.shape, device=positions.device)
    if real is not None:
        bias = bias.masked_fill(~real, float('-inf'))
    if gathering is not None:
        bias = torch.cat((bias, gathering.expand(bias.shape[0], -1, -1)), dim=-1)
    return bias[:, :, None, None]

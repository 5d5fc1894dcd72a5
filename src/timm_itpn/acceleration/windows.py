"""Windows of a grid of tokens.

Sides need not divide: the windows of a side differ by at most one token. All are stored with as many positions as the
largest has; a smaller one has its padded positions last. A token's position is its index on the grid, row-major; padded
ones have the number of tokens as position, one beyond the last.
"""
import torch

__all__ = ['is_padded', 'num_windows', 'partition', 'smallest_window', 'window_positions']


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
    positions = torch.where(y < rows[:, None, None], positions, height * width)
    return positions.flatten(0, 1)


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

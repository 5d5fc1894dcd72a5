"""Token migration: in each window the tokens that are most like others leave, and return later to their positions.

Pure functions on tokens (B, W, K, C) of W windows. The K tokens of a window are in raster order, padded positions last.
"""
import torch
import torch.nn.functional as F

__all__ = ['replenish', 'select', 'similarity', 'take']


def similarity(features: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """How much each token of half A is like a token of half B: its largest cosine.

    Half A is every second token of a window in raster order, half B the others: alternating columns, if a window is an
    even number of tokens wide.

    Args:
        features: (B, W, K, D), what tokens are compared by.
        real: (1 or B, W, K), True where a position is not padded; None if none is.

    Returns:
        (B, W, K // 2), -1 to 1 for tokens 1, 3, 5, ...; -inf for padded positions.
    """
    features = F.normalize(features, dim=-1)
    cosine = features[:, :, 1::2] @ features[:, :, ::2].transpose(-2, -1)  # (B, W, K // 2, K - K // 2)
    if real is not None:
        cosine = cosine.masked_fill(~real[:, :, None, ::2], float('-inf'))
    nearest = cosine.amax(dim=-1)
    if real is not None:
        nearest = nearest.masked_fill(~real[:, :, 1::2], float('-inf'))
    return nearest


def select(nearest: torch.Tensor, num_tokens: int, num_leave: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the tokens that leave: those of half A with the largest similarity, the same number in every window.

    Args:
        nearest: (B, W, K // 2), as from `similarity`.
        num_tokens: K, positions in a window.
        num_leave: Tokens of each window that leave, at most half of its real ones.

    Returns:
        Indices of those that stay (B, W, K - num_leave) and of those that leave (B, W, num_leave), in raster order.
    """
    nearest = nearest.masked_fill(nearest.isnan(), float('-inf'))
    index = torch.arange(nearest.shape[2], device=nearest.device)
    score, other = nearest[:, :, :, None], nearest[:, :, None, :]
    # counted, not sorted: of equally similar tokens the first leave, on every device and in every exporter
    before = (other > score) | ((other == score) & (index < index[:, None]))
    leaves = F.pad((before.sum(dim=-1) < num_leave).long()[..., None], (1, 0)).flatten(2)  # one of half B before each
    leaves = F.pad(leaves, (0, num_tokens - leaves.shape[2]))  # (B, W, K)
    slot = torch.where(leaves > 0, num_tokens - num_leave + leaves.cumsum(-1), (1 - leaves).cumsum(-1)) - 1
    order = torch.zeros_like(slot).scatter(-1, slot, torch.arange(num_tokens, device=slot.device).expand(slot.shape))
    return order[:, :, :num_tokens - num_leave], order[:, :, num_tokens - num_leave:]


def take(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Take tokens of each window: (B, W, K, C) and indices (B, W, M) below K -> (B, W, M, C)."""
    B, W, K, C = x.shape
    first = torch.arange(B * W, device=x.device).reshape(B, W, 1) * K
    return x.reshape(B * W * K, C).index_select(0, (first + indices).flatten()).reshape(B, W, indices.shape[2], C)


def replenish(tokens: list[torch.Tensor], positions: list[torch.Tensor], num_tokens: int) -> torch.Tensor:
    """Bring all tokens back to the grid, those that stayed and those that left.

    Args:
        tokens: Groups of tokens (B, W, K, C), each token in one of them.
        positions: Their positions (B, W, K) on the grid; `num_tokens` for what is to be dropped.
        num_tokens: N, tokens of the grid.

    Returns:
        (B, N, C), row-major.
    """
    x = torch.cat(tokens, dim=2).flatten(1, 2)
    index = torch.cat(positions, dim=2).flatten(1, 2)
    B, _, C = x.shape
    grid = x.new_zeros(B, num_tokens + 1, C)  # padded positions meet in the last row
    return grid.scatter(1, index[:, :, None].expand(x.shape), x)[:, :num_tokens]

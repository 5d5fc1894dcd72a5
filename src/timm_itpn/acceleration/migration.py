"""Token migration: in each window the tokens that are most like others leave, and return later to their positions.

Pure functions on tokens (B, W, K, C) of W windows. The K tokens of a window are in raster order, padded positions last.
A token that leaves has a partner, the token that it is most like. The paper stores the token, and brings it back as it
was. What is carried is ours: when it comes back, what its partner went through since then is added to it.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Left(NamedTuple):
    """Tokens that left at one block, M of each window, with their partners."""
    tokens: torch.Tensor  # as they were (B, W, M, C)
    positions: torch.Tensor  # on the grid (B, W, M), row-major
    partners: torch.Tensor  # as they were at that time (B, W, M, C)
    partner_positions: torch.Tensor  # likewise; at a later block partners may leave too


def similarity(features: torch.Tensor, real: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """How much each token of half A is like a token of half B, its largest cosine, and like which one: its partner.

    Half A is every second token of a window in raster order, half B the others: alternating columns, if a window is an
    even number of tokens wide.

    Args:
        features: (B, W, K, D), what tokens are compared by.
        real: (1 or B, W, K), True where a position is not padded; None if none is.

    Returns:
        Cosines (B, W, K // 2), -1 to 1 for tokens 1, 3, 5, ..., -inf for padded positions; and indices of the partners
        (B, W, K // 2), of equally similar ones the first.
    """
    features = F.normalize(features, dim=-1)
    cosine = features[:, :, 1::2] @ features[:, :, ::2].transpose(-2, -1)  # (B, W, K // 2, K - K // 2)
    if real is not None:
        cosine = cosine.masked_fill(~real[:, :, None, ::2], float('-inf'))
    nearest, partner = cosine.max(dim=-1)
    if real is not None:
        nearest = nearest.masked_fill(~real[:, :, 1::2], float('-inf'))
    return nearest, 2 * partner


def select(
        nearest: torch.Tensor,
        partners: torch.Tensor,
        num_tokens: int,
        num_leave: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the tokens that leave: those of half A with the largest similarity, the same number in every window.

    Args:
        nearest: (B, W, K // 2), as from `similarity`, and
        partners: (B, W, K // 2), likewise.
        num_tokens: K, positions in a window.
        num_leave: Tokens of each window that leave, at most half of its real ones.

    Returns:
        Indices of those that stay (B, W, K - num_leave) and of those that leave (B, W, num_leave), in raster order; and
        of the partners of the latter (B, W, num_leave).
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
    leave = order[:, :, num_tokens - num_leave:]
    return order[:, :, :num_tokens - num_leave], leave, partners.gather(2, leave // 2)


def depart(
        x: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        real: torch.Tensor | None,
        num_leave: int,
) -> tuple[torch.Tensor, torch.Tensor, Left]:
    """Let tokens leave.

    Args:
        x: Tokens (B, W, K, C).
        positions: Theirs on the grid (B, W, K).
        keys: What they are compared by (B, W, K, D).
        real: As for `similarity`.
        num_leave: As for `select`.

    Returns:
        Tokens and positions of those that stay, and those that left.
    """
    with torch.no_grad():
        nearest, partners = similarity(keys, real)
        stay, leave, partners = select(nearest, partners, positions.shape[2], num_leave)
    left = Left(  # no views: FSDP2 warns of those
        take(x, leave).clone(), positions.gather(2, leave),
        take(x, partners).clone(), positions.gather(2, partners))
    return take(x, stay), positions.gather(2, stay), left


def take(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Take tokens of each window: (B, W, K, C) and indices (B, W, M) below K -> (B, W, M, C)."""
    B, W, K, C = x.shape
    first = torch.arange(B * W, device=x.device).reshape(B, W, 1) * K
    return x.reshape(B * W * K, C).index_select(0, (first + indices).flatten()).reshape(B, W, indices.shape[2], C)


def replenish(
        x: torch.Tensor,
        positions: torch.Tensor,
        left: list[Left | None],
        num_tokens: int,
        carry: bool,
) -> torch.Tensor:
    """Bring all tokens back to the grid, those that stayed and those that left.

    Args:
        x: Tokens that stayed (B, W, K, C).
        positions: Theirs on the grid (B or 1, W, K); `num_tokens` for what is to be dropped.
        left: Those that left, in the order in which they did; None where none did.
        num_tokens: N, tokens of the grid.
        carry: Add to each token that left what its partner has changed by since then; False = it is as it was.

    Returns:
        (B, N, C), row-major.
    """
    B, _, _, C = x.shape
    grid = _put(x.new_zeros(B, num_tokens + 1, C), positions, x)  # padded positions meet in the last row
    for group in left[::-1]:  # a partner that left later is up to date by then
        if group is not None:
            tokens = group.tokens
            if carry:
                now = take(grid[:, None], group.partner_positions.flatten(1)[:, None]).reshape(tokens.shape)
                tokens = tokens + (now - group.partners)
            grid = _put(grid, group.positions, tokens)
    return grid[:, :num_tokens]


def _put(grid: torch.Tensor, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The grid (B, N, C) with tokens (B, W, K, C) at positions (B or 1, W, K)."""
    x = x.flatten(1, 2)
    return grid.scatter(1, positions.flatten(1)[:, :, None].expand(x.shape), x)

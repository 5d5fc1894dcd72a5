"""Layers that work per position, on a part of the positions at a time."""
import torch
import torch.nn as nn

from .eager import is_eager

__all__ = ['in_parts']

PART_SIZE = 2 ** 19  # elements of a map; with three times as many hidden channels 6 MiB in float32


def in_parts(blocks: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Run per-position blocks on maps (B, H, W, C); for inference on the CPU on a few rows at a time.

    A tensor of more than 32 MiB gets new pages from the system each time, which cost about as much as the product that
    fills it; smaller ones get memory that was used before, and is in the cache. Training keeps its tensors anyway.
    """
    if torch.is_grad_enabled() or not is_eager(x) or not x.is_cpu or x.numel() <= PART_SIZE:
        return blocks(x)
    rows = x.flatten(0, 1)  # (B, H, W, C) -> (B*H, W, C)
    parts = rows.split(max(1, PART_SIZE // rows[0].numel()))
    return torch.cat([blocks(part) for part in parts]).unflatten(0, x.shape[:2])

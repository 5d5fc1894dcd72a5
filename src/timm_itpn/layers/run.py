"""How blocks are run: with gradient checkpointing, or for inference on the CPU on some of the positions at a time."""
import torch
import torch.nn as nn
from timm.models import checkpoint, checkpoint_seq

__all__ = ['is_eager', 'run_blocks']

SLICE_SIZE = 2 ** 19  # elements of a map; with three times as many hidden channels 6 MiB in float32


def is_eager(x: torch.Tensor) -> bool:
    """True if `x` is computed with now, not traced; FX has stand-ins for tensors."""
    return isinstance(x, torch.Tensor) and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def run_blocks(blocks: nn.Module, x: torch.Tensor, checkpointing: bool) -> torch.Tensor:
    """Run per-position blocks on maps (B, H, W, C); TorchScript calls `blocks` itself.

    On a CPU without gradients they run on a few rows at a time: a tensor of more than 32 MiB gets new pages from the
    system each time, which cost about as much as the product that fills it. A hooked layer sees whole maps.

    Args:
        blocks: A block that works on each position by itself, or a Sequential of such.
        x: Maps.
        checkpointing: Recompute each block in the backward pass instead of keeping its activations.
    """
    if checkpointing:
        return checkpoint_seq(blocks, x) if isinstance(blocks, nn.Sequential) else checkpoint(blocks, x)
    if torch.is_grad_enabled() or not is_eager(x) or not x.is_cpu or x.numel() <= SLICE_SIZE or _is_hooked(blocks):
        return blocks(x)
    rows = x.flatten(0, 1)  # (B, H, W, C) -> (B*H, W, C)
    slices = rows.split(max(1, SLICE_SIZE // rows[0].numel()))
    return torch.cat([blocks(rows) for rows in slices]).unflatten(0, x.shape[:2])


def _is_hooked(blocks: nn.Module) -> bool:
    return nn.modules.module._has_any_global_hook() or any(
        module._forward_hooks or module._forward_pre_hooks for module in blocks.modules())

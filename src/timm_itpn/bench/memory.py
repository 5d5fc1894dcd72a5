"""Peak memory of a call above what was there before: activations, outputs and gradients, but not the weights."""
from collections.abc import Callable
from typing import Any

import torch

__all__ = ['peak_bytes']


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Largest number of bytes that were in use at once during `call`, above those in use before it.

    On CUDA by the allocator's own statistics; on the CPU counted from all allocations that PyTorch's profiler sees, so
    it repeats exactly. Buffers inside of MKL and oneDNN are not PyTorch's and are not seen.
    """
    return _cuda_peak_bytes(call) if device == 'cuda' else _cpu_peak_bytes(call)


def _cuda_peak_bytes(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak_bytes(call: Callable[[], object]) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = call()
    profiler: Any = profile.profiler
    del kept  # only now, or its end would be one more event
    changes = [(e.start_ns(), e.nbytes()) for e in profiler.kineto_results.events() if e.name() == '[memory]']
    in_use = peak = 0
    for _, num_bytes in sorted(changes, key=lambda change: change[0]):
        in_use += num_bytes
        peak = max(peak, in_use)
    return peak

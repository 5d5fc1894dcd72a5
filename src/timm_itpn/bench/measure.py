"""Measure one case: all candidates in turn, and one row for each."""
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

import torch
import torch.nn as nn

from ..ops.attention import record_kernels
from .candidates import BASELINE, NUM_CLASSES, OURS, Candidate, build
from .cases import Asked, Case
from .flops import count_flops, count_products, product_calls, rates, training_loss
from .rows import Row, this_machine

Key = TypeVar('Key')
Call = Callable[[], object]

# Largest error of outputs that have to agree with ours, relative to those (root mean square): a few times what the
# rounding of the type does to these models.
TOLERANCES = {'float32': 1e-3, 'float16': 2e-2, 'bfloat16': 5e-2, 'amp_bfloat16': 5e-2}

_MIB = 2 ** 20
_GRAPH_MODES = ('reduce-overhead', 'max-autotune')  # of torch.compile: the memory of CUDA graphs is there before a call


def measure(case: Case, asked: Asked) -> list[Row]:
    """Measure a case.

    Args:
        case: What to measure; it has passed `cases.check`.
        asked: What is measured beside the model, where and how often.

    Returns:
        A row for each candidate, ours first.
    """
    on_cuda, train = asked.device == 'cuda', case.mode == 'train'
    repeats = asked.repeats or (50 if case.mode == 'latency' else 30 if on_cuda else 10)
    warmup = asked.warmup or (5 if on_cuda else 1)  # on CUDA clocks and graphs take more calls to settle
    _say(f'{case}, {asked.device}: building')
    candidates = build(case, asked)
    images, targets = _inputs(case, asked.device)
    calls = {c.name: _workload(c, case, images, targets) for c in candidates}
    gflop = {c.name: count_flops(c.model, images, train) / case.batch / 1e9 for c in candidates}
    kernels, errors = _compare_outputs(candidates, case, images)
    agree = [c.name for c in candidates if not c.same_function or errors[c.name] <= TOLERANCES[case.dtype]]
    for name in calls.keys() - agree:  # NaN differs, too
        _say(f'  {name}: the outputs differ from ours by {errors[name]:.2g}, so it is not compared')
    peaks_mib: dict[str, float | None] = {}
    start = time.perf_counter()
    for c in candidates:
        _say(f'  {c.name}: peak memory')
        is_graph = on_cuda and asked.compile in _GRAPH_MODES and not isinstance(c.run, nn.Module)
        peaks_mib[c.name] = None if is_graph else peak_bytes(calls[c.name], asked.device) / _MIB
    expected_s = (time.perf_counter() - start) * (repeats + warmup)

    _say(f'  {repeats} rounds of {", ".join(calls)}: about {max(1, expected_s):.0f} s')
    products = count_products(candidates[0].model, images)
    ceiling_calls = product_calls(products, _compute_dtype(case), asked.device)
    times_ms = time_in_turn({**calls, **ceiling_calls}, repeats, warmup, asked.device)
    fastest, mm = rates(products, {key: times_ms[key] for key in ceiling_calls})
    if asked.compile:
        torch.compiler.reset()  # it holds the models

    def speedup(name: str, over: str) -> float | None:
        """Median of the ratios round by round, which a slow round does not change."""
        ratios = (a / b for a, b in zip(times_ms[over], times_ms[name]))
        return statistics.median(ratios) if name in agree else None

    rows = []
    for c in candidates:
        twentieths = statistics.quantiles(times_ms[c.name], n=20, method='inclusive')
        rows.append(Row(
            case=case,
            candidate=c.name,
            same_function=c.same_function,
            gflop_per_image=gflop[c.name],
            kernels=kernels[c.model],
            output_error=errors[c.name],
            peak_memory_mib=peaks_mib[c.name],
            ms=statistics.median(times_ms[c.name]),
            p95_ms=twentieths[18],
            relative_iqr=(twentieths[14] - twentieths[4]) / twentieths[9],
            speedup_over_ours=speedup(c.name, OURS),
            speedup_over_baseline=speedup(c.name, BASELINE) if BASELINE in agree and c.same_weights else None,
            ceiling_tflop_per_s=fastest / 1e12,
            mm_tflop_per_s=mm / 1e12,
            repeats=repeats,
            warmup=warmup,
            machine=this_machine(asked.device),
        ))
    return rows


def measure_alone(case: Case, asked: Asked) -> list[Row]:
    """As `measure`, in a process of its own, whose memory no other case used before."""
    with ProcessPoolExecutor(1, get_context('spawn'), torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.submit(measure, case, asked).result()


def time_in_turn(calls: Mapping[Key, Call], repeats: int, warmup: int, device: str) -> dict[Key, list[float]]:
    """Time calls in turn, A B A B ..., so that a machine that slows down slows every one of them down.

    Args:
        calls: What to time, in the order of a round.
        repeats: Rounds that count.
        warmup: Rounds before them that do not.
        device: 'cpu' or 'cuda', which is waited for before and after each call.

    Returns:
        Wall-clock milliseconds of each call in each round.
    """
    synchronize: Call = torch.cuda.synchronize if device == 'cuda' else lambda: None
    times_ms: dict[Key, list[float]] = {name: [] for name in calls}
    for number in range(-warmup, repeats):
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if number >= 0:
                times_ms[name].append(1000 * (time.perf_counter() - start))
    return times_ms


def peak_bytes(call: Call, device: str) -> int:
    """Largest number of bytes that were in use at once during a call, above those in use before it.

    These are activations, outputs and gradients, but not the weights. On CUDA by the allocator's own statistics; on the
    CPU counted from all allocations that PyTorch's profiler sees, so it repeats exactly. Buffers inside of MKL and
    oneDNN are not PyTorch's and are not seen.
    """
    if device == 'cuda':
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = call()
    del kept  # only now, or its end would be one more event
    profiler: Any = profile.profiler
    changes = [event for event in profiler.kineto_results.events() if event.name() == '[memory]']
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in changes), initial=0))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _inputs(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and classes."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch, 3, *case.img_size, generator=generator)
    targets = torch.randint(NUM_CLASSES, (case.batch,), generator=generator)
    return images.to(device, getattr(torch, case.weight_dtype)), targets.to(device)


def _compute_dtype(case: Case) -> torch.dtype:
    return getattr(torch, case.dtype.removeprefix('amp_'))


def _autocast(case: Case, images: torch.Tensor) -> torch.autocast:
    return torch.autocast(images.device.type, _compute_dtype(case), enabled=case.dtype != case.weight_dtype)


def _workload(candidate: Candidate, case: Case, images: torch.Tensor, targets: torch.Tensor) -> Callable[[], object]:
    """What is timed: a forward pass, or a step of training without the optimizer."""
    def forward() -> object:
        with torch.inference_mode(), _autocast(case, images):
            return candidate.run(images)

    def train() -> None:
        with _autocast(case, images):
            outputs = candidate.run(images)
        training_loss(outputs, targets).backward()
        candidate.model.zero_grad()

    return train if case.mode == 'train' else forward


def _compare_outputs(
        candidates: list[Candidate], case: Case, images: torch.Tensor,
) -> tuple[dict[nn.Module, list[str]], dict[str, Any]]:
    """Run each candidate once; compiled models run as they will be timed.

    Returns:
        Model -> attention kernels that ran. Name of a candidate -> error of its outputs relative to ours, None where
        they are of another kind.
    """
    kernels: dict[nn.Module, list[str]] = {}
    errors: dict[str, float | None] = {}
    expected: list[torch.Tensor] = []
    for c in candidates:
        _say(f'  {c.name}: outputs')
        if isinstance(c.run, nn.Module):  # not in inference mode, where kernels are not recorded
            with torch.no_grad(), record_kernels() as recorded, _autocast(case, images):
                outputs = c.run(images)
            kernels[c.model] = recorded.names
        else:  # in the mode in which it is timed, or it would be compiled twice
            with torch.inference_mode(case.mode != 'train'), _autocast(case, images):
                outputs = c.run(images)
        errors[c.name] = None
        if c.same_weights:
            levels = [outputs] if isinstance(outputs, torch.Tensor) else outputs
            found = [level.detach().double() for level in levels]
            expected = expected or found
            errors[c.name] = _relative_error(found, expected)
    return kernels, errors


def _relative_error(outputs: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Root mean square of the difference relative to that of `expected`; the largest of several, NaN if one is NaN."""
    errors = [(a - b).square().mean() / b.square().mean() for a, b in zip(outputs, expected)]
    return torch.stack(errors).max().sqrt().item()


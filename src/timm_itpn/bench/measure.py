"""Measure one case: all candidates in turn, and one row for each."""
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from multiprocessing import get_context
from typing import NamedTuple

import torch

from ..ops.kernels import record_kernels
from .candidates import BASELINE, NUM_CLASSES, OURS, Candidate, Kind, build
from .cases import DTYPES, Candidates, Case, Rounds
from .ceiling import product_calls, rates
from .flops import as_list, count_flops, count_products, training_loss
from .machine import this_machine
from .memory import peak_bytes
from .rows import Row
from .timing import Call, alternate, median_ratio, relative_iqr

__all__ = ['TOLERANCES', 'measure', 'measure_alone']

# Largest error of outputs that have to agree with ours, relative to those (root mean square): a few times what the
# rounding of the type does to these models.
TOLERANCES = {'float32': 1e-3, 'float16': 2e-2, 'bfloat16': 5e-2, 'amp_bfloat16': 5e-2}

_MIB = 2 ** 20
_GRAPH_MODES = ('reduce-overhead', 'max-autotune')  # of torch.compile: CUDA graphs keep their memory


class _Outputs(NamedTuple):
    """What a first run of a candidate tells."""
    kernels: list[str]
    error: float | None  # relative to ours, None where they cannot be compared
    agree: bool  # with ours, or need not


def measure(case: Case, asked: Candidates, rounds: Rounds, device: str) -> list[Row]:
    """Measure a case.

    Args:
        case: What to measure; it has passed `cases.check`.
        asked: What is measured beside the model.
        rounds: How often.
        device: 'cpu' or 'cuda'.

    Returns:
        A row for each candidate, ours first.
    """
    repeats = rounds.repeats or (50 if case.mode == 'latency' else 10 if device == 'cpu' else 30)
    warmup = rounds.warmup or (1 if device == 'cpu' else 5)  # on CUDA clocks and graphs take more calls to settle
    _say(f'{case}, {device}: building')
    candidates = build(case, asked, device)
    images, targets = _inputs(case, device)
    train = case.mode == 'train'
    calls: dict[str, Call] = {c.name: _workload(c, case, images, targets) for c in candidates}
    gflop = {c.name: count_flops(c.plain, images, train) / case.batch / 1e9 for c in candidates}
    outputs = _compare_outputs(candidates, case, images)
    peaks_mib = {}
    start = time.perf_counter()
    for c in candidates:
        _say(f'  {c.name}: peak memory')
        peaks_mib[c.name] = _peak_memory_mib(c, calls[c.name], device)
    expected_s = (time.perf_counter() - start) * (repeats + warmup)

    _say(f'  {repeats} rounds of {", ".join(calls)}: about {max(1, expected_s):.0f} s')
    synchronize: Call = torch.cuda.synchronize if device == 'cuda' else lambda: None
    products = count_products(candidates[0].model, images)
    ceiling_calls = product_calls(products, _compute_dtype(case), device)
    times = alternate({**calls, **ceiling_calls}, repeats, warmup, synchronize)
    times_ms = {name: times[name] for name in calls}
    fastest, mm = rates(products, {key: times[key] for key in ceiling_calls})
    if asked.compile:
        torch.compiler.reset()  # it holds the models
    has_baseline = asked.baseline and outputs[BASELINE].agree

    def speedup(name: str, over: str) -> float | None:
        return median_ratio(times_ms[over], times_ms[name]) if outputs[name].agree else None

    return [
        Row(
            case=case,
            candidate=c.name,
            same_function=c.kind is Kind.SAME_FUNCTION,
            gflop_per_image=gflop[c.name],
            kernels=outputs[c.name].kernels,
            output_error=outputs[c.name].error,
            peak_memory_mib=peaks_mib[c.name],
            ms=statistics.median(times_ms[c.name]),
            p95_ms=statistics.quantiles(times_ms[c.name], n=20, method='inclusive')[-1],
            relative_iqr=relative_iqr(times_ms[c.name]),
            speedup_over_ours=speedup(c.name, OURS),
            speedup_over_baseline=speedup(c.name, BASELINE) if has_baseline and c.kind is not Kind.OTHER else None,
            ceiling_tflop_per_s=fastest / 1e12,
            mm_tflop_per_s=mm / 1e12,
            repeats=repeats,
            warmup=warmup,
            machine=this_machine(device),
        )
        for c in candidates]


def measure_alone(case: Case, asked: Candidates, rounds: Rounds, device: str) -> list[Row]:
    """As `measure`, in a process of its own, whose memory no other case used before."""
    with ProcessPoolExecutor(1, get_context('spawn'), torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.submit(measure, case, asked, rounds, device).result()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _inputs(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and classes."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch, 3, *case.img_size, generator=generator)
    targets = torch.randint(NUM_CLASSES, (case.batch,), generator=generator)
    return images.to(device, getattr(torch, DTYPES[case.dtype][0])), targets.to(device)


def _compute_dtype(case: Case) -> torch.dtype:
    weights, autocast = DTYPES[case.dtype]
    return getattr(torch, autocast or weights)


def _autocast(case: Case, images: torch.Tensor) -> AbstractContextManager[object]:
    _, autocast = DTYPES[case.dtype]
    return torch.autocast(images.device.type, _compute_dtype(case)) if autocast else nullcontext()


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


def _compare_outputs(candidates: list[Candidate], case: Case, images: torch.Tensor) -> dict[str, _Outputs]:
    """Run each candidate once: which attention kernels run, and how far its outputs are from those of ours.

    Compiled models run as they will be timed, and have the kernels of what they were made of.
    """
    results: dict[str, _Outputs] = {}
    kernels: dict[object, list[str]] = {}
    expected: list[torch.Tensor] = []
    for c in candidates:
        _say(f'  {c.name}: outputs')
        if c.run is c.model:  # not in inference mode, where kernels are not recorded
            with record_kernels() as recorded, _autocast(case, images):
                outputs = c.run(images)
            kernels[c.model] = recorded.names
        else:  # in the mode in which it is timed, or it would be compiled twice
            with torch.inference_mode(case.mode != 'train'), _autocast(case, images):
                outputs = c.run(images)
        error, agree = None, True
        if c.kind is not Kind.OTHER:
            found = [output.detach().double() for output in as_list(outputs)]
            expected = expected or found
            error = _relative_error(found, expected)
            agree = c.kind is not Kind.SAME_FUNCTION or error <= TOLERANCES[case.dtype]  # NaN does not
        if not agree:
            _say(f'  {c.name}: the outputs differ from ours by {error:.2g}, so it is not compared')
        results[c.name] = _Outputs(kernels[c.model], error, agree)
    return results


def _relative_error(outputs: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Root mean square of the difference relative to that of `expected`; the largest of several, NaN if one is NaN."""
    errors = [(a - b).square().mean() / b.square().mean() for a, b in zip(outputs, expected)]
    return torch.stack(errors).max().sqrt().item()


def _peak_memory_mib(candidate: Candidate, call: Call, device: str) -> float | None:
    if device == 'cuda' and any(f'({mode})' in candidate.name for mode in _GRAPH_MODES):
        return None  # the memory of a graph is there before the call
    return peak_bytes(call, device) / _MIB

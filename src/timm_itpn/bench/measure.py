"""Measure one case: everyone in turn, and one row for each."""
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn as nn

from ..layers.attention import Attention
from ..ops.kernels import record_kernels
from .cases import DTYPES, Case, Rivals, Rounds, height_width
from .ceiling import Ceiling
from .contestants import BASELINE, NUM_CLASSES, OURS, Contestant, Kind, build, checkpoint_gradients
from .flops import as_list, count_flops, count_products, training_loss
from .machine import facts
from .memory import peak_bytes
from .processes import in_processes
from .rows import same_function
from .timing import EventWatch, WallWatch, alternate, median_ratio, quantile, spread

__all__ = ['measure', 'measure_alone']

MIB = 2 ** 20
GRAPH_MODES = ('reduce-overhead', 'max-autotune')  # of torch.compile: CUDA graphs keep their memory

# Largest error of an output that computes the same, relative to that of ours (root mean square): a few times what the
# rounding of the type does to these models.
TOLERANCES = {'float32': 1e-3, 'float16': 2e-2, 'bfloat16': 5e-2, 'amp_bfloat16': 5e-2}


def measure(case: Case, rivals: Rivals, rounds: Rounds, device: str) -> list[dict[str, Any]]:
    """Measure a case.

    Args:
        case: What to measure; it has passed `cases.check`.
        rivals: Who is measured beside the model.
        rounds: How often.
        device: 'cpu' or 'cuda'.

    Returns:
        A row for each contestant, ours first. `ratio` is its time by that of ours, round by round; it is None if its
        outputs should agree with ours and do not.
    """
    repeats, warmup = rounds.resolved(case.mode, device)
    say(f'{case}, {device}: building')
    contestants = build(case, rivals, device)
    images, targets = inputs(case, device)
    calls: dict[Any, Callable[[], Any]] = {c.name: workload(c, case, images, targets) for c in contestants}
    rows = {c.name: describe(c, case, images) for c in contestants}
    if case.grad_checkpointing:
        checkpoint_gradients(contestants)  # only now: what is computed twice does not count twice
    check_outputs(contestants, rows, case, images)
    for contestant in contestants:
        say(f'  {contestant.name}: peak memory')
        rows[contestant.name]['peak_memory_mib'] = peak_memory_mib(contestant, calls[contestant.name], device)

    say(f'  {repeats} rounds of {", ".join(calls)}')
    ceiling = Ceiling(count_products(contestants[0].model, images), compute_dtype(case), device)
    times_ms = alternate({**calls, **ceiling.calls}, repeats, warmup, watch(case, device))
    rate = ceiling.rate(times_ms)
    for name, row in rows.items():
        row.update(timed(row, case, times_ms[name], times_ms[OURS], times_ms.get(BASELINE), rate))
        row.update(mm_tflop_per_s=ceiling.rate(times_ms, ways=('mm',)) / 1e12)
        row.update(repeats=repeats, warmup=warmup, device=device, **facts(device))
    baseline = rows.get(BASELINE)
    if baseline is not None and not agrees(baseline, case):
        for row in rows.values():
            row['speedup_over_baseline'] = None
    if rivals.compile:
        torch.compiler.reset()  # it holds the models
    return list(rows.values())


def measure_alone(case: Case, rivals: Rivals, rounds: Rounds, device: str) -> list[dict[str, Any]]:
    """As `measure`, in a process of its own, which has no memory that another case used before."""
    run = partial(measure, case, rivals, rounds)
    rows, = in_processes(run, [device], processes=1, threads=torch.get_num_threads())
    return list(rows)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def inputs(case: Case, device: str) -> Any:
    """Random images and classes."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch, 3, *height_width(case.size), generator=generator)
    targets = torch.randint(NUM_CLASSES, (case.batch,), generator=generator)
    return images.to(device, getattr(torch, DTYPES[case.dtype][0])), targets.to(device)


def compute_dtype(case: Case) -> torch.dtype:
    weights, autocast = DTYPES[case.dtype]
    dtype: torch.dtype = getattr(torch, autocast or weights)
    return dtype


def autocast(case: Case, images: torch.Tensor) -> AbstractContextManager[Any]:
    if DTYPES[case.dtype][1] is None:
        return nullcontext()
    return torch.autocast(images.device.type, compute_dtype(case))


def grad_mode(case: Case) -> AbstractContextManager[Any]:
    """One for all calls of a case: a compiler would compile for each."""
    context: AbstractContextManager[Any] = torch.inference_mode(case.mode != 'train')
    return context


def workload(
        contestant: Contestant, case: Case, images: torch.Tensor, targets: torch.Tensor) -> Callable[[], Any]:
    """What is timed: a forward pass, or a step of training without the optimizer."""
    def forward() -> Any:
        with grad_mode(case), autocast(case, images):
            return contestant.run(images)

    def train() -> None:
        with grad_mode(case), autocast(case, images):
            outputs = contestant.run(images)
        training_loss(outputs, targets).backward()
        contestant.model.zero_grad(set_to_none=True)

    return train if case.mode == 'train' else forward


def describe(contestant: Contestant, case: Case, images: torch.Tensor) -> dict[str, Any]:
    """What is known of a contestant without running it."""
    return {
        **case._asdict(),
        'contestant': contestant.name,
        'same_function': contestant.kind is Kind.SAME_FUNCTION,
        'gflop_per_image': count_flops(contestant.plain, images, case.mode == 'train') / case.batch / 1e9,
        'attention': attention_of(contestant.model),
    }


def attention_of(model: nn.Module) -> str | None:
    """Implementation that a model of ours has chosen."""
    return next((module.attn_impl for module in model.modules() if isinstance(module, Attention)), None)


def check_outputs(
        contestants: list[Contestant], rows: dict[str, dict[str, Any]], case: Case, images: torch.Tensor) -> None:
    """Write into each row which attention kernels ran, and how far its outputs are from those of ours.

    Compiled models run as they will be timed, and have the kernels of what they were made of.
    """
    expected, kernels = None, {}
    for contestant in contestants:
        say(f'  {contestant.name}: outputs')
        if contestant.run is contestant.model:
            with record_kernels() as recorded, autocast(case, images):
                outputs = contestant.model(images)
            kernels[contestant.model] = recorded.names
        else:
            with grad_mode(case), autocast(case, images):
                outputs = contestant.run(images)
        error = None
        if contestant.kind is not Kind.OTHER:
            outputs = [output.detach().double() for output in as_list(outputs)]
            expected = outputs if expected is None else expected
            error = relative_error(outputs, expected)
        rows[contestant.name].update(kernels=kernels[contestant.model], output_error=error)
        if not agrees(rows[contestant.name], case):
            say(f'  {contestant.name}: the outputs differ from ours by {error:.2g}, so there is no ratio')


def relative_error(outputs: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Root mean square of the difference by that of what is expected; of several outputs the largest, NaN if one is."""
    errors = [(a - b).square().mean() / b.square().mean() for a, b in zip(outputs, expected)]
    return torch.stack(errors).max().sqrt().item()


def agrees(row: dict[str, Any], case: Case) -> bool:
    """True if outputs are as near to ours as they have to be; NaN is not."""
    return not same_function(row) or row['output_error'] <= TOLERANCES[case.dtype]


def peak_memory_mib(contestant: Contestant, call: Callable[[], Any], device: str) -> float | None:
    if device == 'cuda' and any(f'({mode})' in contestant.name for mode in GRAPH_MODES):
        return None  # the memory of a graph is there before the call
    return peak_bytes(call, device) / MIB


def watch(case: Case, device: str) -> Any:
    if device == 'cpu':
        return WallWatch()
    return WallWatch(torch.cuda.synchronize) if case.mode == 'latency' else EventWatch()


def timed(
        row: dict[str, Any],
        case: Case,
        times_ms: list[float],
        ours_ms: list[float],
        baseline_ms: list[float] | None,
        ceiling: float,
) -> dict[str, Any]:
    """The part of a row that follows from the times.

    Args:
        row: What is known already.
        case: The case.
        times_ms: Time of each round.
        ours_ms: The same of ours.
        baseline_ms: The same of the baseline, None if it does not take part.
        ceiling: Operations per second of the machine.
    """
    median_ms = statistics.median(times_ms)
    rate = row['gflop_per_image'] * 1e9 * case.batch / (median_ms / 1000)
    comparable, same_weights = agrees(row, case), row['output_error'] is not None
    over_baseline = median_ratio(baseline_ms, times_ms) if comparable and same_weights and baseline_ms else None
    return {
        'ms': median_ms,
        'p95_ms': quantile(times_ms, 0.95),
        'spread': spread(times_ms),
        'ms_per_image': median_ms / case.batch,
        'images_per_s': 1000 * case.batch / median_ms,
        'tflop_per_s': rate / 1e12,
        'ceiling_tflop_per_s': ceiling / 1e12,
        'share_of_ceiling': rate / ceiling,
        'ratio': median_ratio(times_ms, ours_ms) if comparable else None,
        'speedup_over_baseline': over_baseline,
    }

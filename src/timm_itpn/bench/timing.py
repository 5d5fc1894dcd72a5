"""Timing in turn, A B A B ..., so that a machine that slows down slows every candidate down."""
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

__all__ = ['alternate', 'event_time', 'median_ratio', 'relative_iqr', 'wall_time']

Call = Callable[[], object]
Read = Callable[[], float]  # milliseconds of a call, asked for at the end of a round


def wall_time(call: Call, synchronize: Call = lambda: None, clock: Callable[[], float] = time.perf_counter) -> Read:
    """Wall-clock time of a call.

    Args:
        call: What to time.
        synchronize: Waits for the device, before and after the call.
        clock: Seconds.
    """
    synchronize()
    start = clock()
    call()
    synchronize()
    time_ms = 1000 * (clock() - start)
    return lambda: time_ms


def event_time(call: Call) -> Read:
    """Time between CUDA events around a call; the host waits for the device only when the time is read."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()

    def read() -> float:
        end.synchronize()
        return start.elapsed_time(end)
    return read


def alternate(
        calls: Mapping[str, Call], repeats: int, warmup: int, timer: Callable[[Call], Read]) -> dict[str, list[float]]:
    """Time calls in turn, round by round.

    Args:
        calls: What to time, by name, in the order of a round.
        repeats: Rounds that count.
        warmup: Rounds before them that do not.
        timer: `wall_time` or `event_time`.

    Returns:
        Milliseconds of each call in each round.
    """
    times_ms: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-warmup, repeats):
        reads = [timer(call) for call in calls.values()]
        for name, read in zip(calls, reads):
            value = read()
            if number >= 0:
                times_ms[name].append(value)
    return times_ms


def relative_iqr(values: Sequence[float]) -> float:
    """Interquartile range as a fraction of the median."""
    first, median, third = statistics.quantiles(values, n=4, method='inclusive')
    return (third - first) / median


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios round by round, which a slow round does not change."""
    return statistics.median(a / b for a, b in zip(numerators, denominators))

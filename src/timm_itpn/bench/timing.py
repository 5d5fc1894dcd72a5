"""Timing in turn, A B A B ..., so that a machine that slows down slows every candidate down."""
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

__all__ = ['alternate', 'median_ratio', 'relative_iqr']

Key = TypeVar('Key')
Call = Callable[[], object]


def alternate(
        calls: Mapping[Key, Call],
        repeats: int,
        warmup: int,
        synchronize: Call = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, list[float]]:
    """Time calls in turn, round by round.

    Args:
        calls: What to time, in the order of a round.
        repeats: Rounds that count.
        warmup: Rounds before them that do not.
        synchronize: Waits for the device, before and after each call.
        clock: Seconds.

    Returns:
        Wall-clock milliseconds of each call in each round.
    """
    times_ms: dict[Key, list[float]] = {name: [] for name in calls}
    for number in range(-warmup, repeats):
        for name, call in calls.items():
            synchronize()
            start = clock()
            call()
            synchronize()
            if number >= 0:
                times_ms[name].append(1000 * (clock() - start))
    return times_ms


def relative_iqr(values: Sequence[float]) -> float:
    """Interquartile range as a fraction of the median."""
    first, median, third = statistics.quantiles(values, n=4, method='inclusive')
    return (third - first) / median


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios round by round, which a slow round does not change."""
    return statistics.median(a / b for a, b in zip(numerators, denominators))

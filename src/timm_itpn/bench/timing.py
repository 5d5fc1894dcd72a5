"""Timing in turn, A B A B ..., so that a machine that slows down slows down everyone."""
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeVar

__all__ = ['EventWatch', 'WallWatch', 'alternate', 'median_ratio', 'quantile', 'spread']

Key = TypeVar('Key', bound=Hashable)
Call = Callable[[], Any]


class Watch(Protocol):
    """Times calls; the times of a round are collected at its end."""

    def time(self, call: Call) -> None: ...

    def collect(self) -> list[float]: ...


class WallWatch:
    """Wall-clock time, one call after the other.

    Args:
        synchronize: Waits for the device before and after each call; None where calls return when they are done.
        clock: Seconds.
    """

    def __init__(self, synchronize: Call | None = None, clock: Callable[[], float] = time.perf_counter):
        self._synchronize = synchronize or (lambda: None)
        self._clock = clock
        self._times_ms: list[float] = []

    def time(self, call: Call) -> None:
        self._synchronize()
        start = self._clock()
        call()
        self._synchronize()
        self._times_ms.append(1000 * (self._clock() - start))

    def collect(self) -> list[float]:
        """Milliseconds of the calls since the last time."""
        times_ms, self._times_ms = self._times_ms, []
        return times_ms


class EventWatch:
    """Time between CUDA events around each call; the host waits for the device once per round."""

    def __init__(self) -> None:
        self._events: list[tuple[Any, Any]] = []

    def time(self, call: Call) -> None:
        import torch

        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        self._events.append((start, end))

    def collect(self) -> list[float]:
        """Milliseconds of the calls since the last time."""
        import torch

        torch.cuda.synchronize()
        events, self._events = self._events, []
        return [start.elapsed_time(end) for start, end in events]


def alternate(calls: dict[Key, Call], repeats: int, warmup: int, watch: Watch) -> dict[Key, list[float]]:
    """Time calls in turn, round by round.

    Args:
        calls: What to time, by name, in the order of a round.
        repeats: Rounds that count.
        warmup: Rounds before them that do not.
        watch: Takes the times.

    Returns:
        Milliseconds of each call in each round.
    """
    times_ms: dict[Key, list[float]] = {name: [] for name in calls}
    for number in range(-warmup, repeats):
        for call in calls.values():
            watch.time(call)
        collected = watch.collect()
        if number >= 0:
            for name, value in zip(calls, collected):
                times_ms[name].append(value)
    return times_ms


def quantile(values: Sequence[float], fraction: float) -> float:
    """Quantile with linear interpolation between the two nearest values."""
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def spread(values: Sequence[float]) -> float:
    """Interquartile range as a fraction of the median."""
    return (quantile(values, 0.75) - quantile(values, 0.25)) / statistics.median(values)


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios round by round: what slows down a whole round leaves it as it is."""
    return statistics.median(a / b for a, b in zip(numerators, denominators))

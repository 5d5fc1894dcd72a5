"""Order of the calls, times and statistics, by a clock that the calls themselves move."""
import pytest

from timm_itpn.bench.timing import WallWatch, alternate, median_ratio, quantile, spread


class Clock:
    """Seconds that pass only when a call says so."""

    def __init__(self):
        self.now_s, self.log = 0., []

    def call(self, name, *seconds):
        """A call that takes the next of `seconds` each time, then the last one."""
        left = list(seconds)

        def run():
            self.log.append(name)
            self.now_s += left.pop(0) if len(left) > 1 else left[0]
        return run


def test_calls_alternate_and_warmup_does_not_count():
    clock = Clock()
    calls = {'a': clock.call('a', 9, 1, 2, 4), 'b': clock.call('b', 9, 0.5)}
    times_ms = alternate(calls, repeats=3, warmup=1, watch=WallWatch(clock=lambda: clock.now_s))
    assert ''.join(clock.log) == 'ab' * 4
    assert times_ms == {'a': [1000, 2000, 4000], 'b': [500, 500, 500]}


def test_device_is_waited_for_before_and_after_each_call():
    clock = Clock()
    watch = WallWatch(synchronize=clock.call('wait', 0.25), clock=lambda: clock.now_s)
    watch.time(clock.call('a', 1))
    assert clock.log == ['wait', 'a', 'wait']
    assert watch.collect() == [1250] and watch.collect() == []


def test_rounds_without_warmup_all_count():
    clock = Clock()
    assert alternate({'a': clock.call('a', 3, 1)}, 2, 0, WallWatch(clock=lambda: clock.now_s)) == {'a': [3000, 1000]}


@pytest.mark.parametrize('fraction, expected', [(0, 1), (0.25, 2), (0.5, 3), (0.95, 8.8), (1, 10)])
def test_quantiles_interpolate(fraction, expected):
    assert quantile([3, 1, 10, 2, 4], fraction) == pytest.approx(expected)


def test_spread_is_the_interquartile_range_by_the_median():
    assert spread([3, 1, 10, 2, 4]) == pytest.approx(2 / 3)
    assert spread([5, 5, 5]) == 0


def test_ratio_is_taken_round_by_round():
    ours, other = [1, 10, 2], [2, 20, 4.2]  # the machine slept in the second round
    assert median_ratio(other, ours) == 2

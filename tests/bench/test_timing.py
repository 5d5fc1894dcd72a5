"""Order of the calls, times and statistics, by a clock that the calls themselves move."""
import pytest

from timm_itpn.bench.timing import alternate, median_ratio, relative_iqr


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


@pytest.mark.parametrize('warmup, expected', [(1, [1000, 2000, 4000]), (0, [9000, 1000, 2000])])
def test_calls_alternate_and_warmup_does_not_count(warmup, expected):
    clock = Clock()
    calls = {'a': clock.call('a', 9, 1, 2, 4), 'b': clock.call('b', 0.5)}
    times_ms = alternate(calls, 3, warmup, clock=lambda: clock.now_s)
    assert ''.join(clock.log) == 'ab' * (3 + warmup)
    assert times_ms == {'a': expected, 'b': [500] * 3}


def test_device_is_waited_for_before_and_after_each_call():
    clock = Clock()
    times_ms = alternate({'a': clock.call('a', 1)}, 1, 0, clock.call('wait', 0.25), clock=lambda: clock.now_s)
    assert clock.log == ['wait', 'a', 'wait'] and times_ms == {'a': [1250]}


def test_interquartile_range_is_relative_to_the_median():
    assert relative_iqr([3, 1, 10, 2, 4]) == pytest.approx(2 / 3)
    assert relative_iqr([5, 5, 5]) == 0


def test_ratio_is_taken_round_by_round():
    ours, other = [1, 10, 2], [2, 20, 4.2]  # the machine slept in the second round
    assert median_ratio(other, ours) == 2

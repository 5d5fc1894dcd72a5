"""Rows of a case: complete, consistent, and without a ratio where outputs differ. No time is judged.

Times are those of a clock that the calls themselves move, peak memory is that of patterns of allocation that are known.
"""
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn as nn

from timm_itpn.bench import candidates, flops
from timm_itpn.bench import measure as measure_file
from timm_itpn.bench.cases import Asked, Case
from timm_itpn.bench.measure import measure, measure_alone, peak_bytes, time_in_turn

KIB = 1024
CASE = Case('fast_itpn_tiny', (32, 32), 2)
PYRAMID = Case('fast_itpn_tiny', (64, 64), 1, pyramid=True)

pytestmark = pytest.mark.usefixtures('one_thread', 'small_models')


@pytest.fixture(autouse=True)
def short_ceiling(monkeypatch):
    monkeypatch.setattr(flops, '_TARGET_FLOPS', {'cpu': 1e6, 'cuda': 1e6})


def test_rows_of_a_forward_case(capsys):
    case = replace(CASE, dtype='amp_bfloat16')
    rows = measure(case, Asked(baseline=True, peers=('test_vit',), repeats=3))
    ours, baseline, peer = rows
    assert capsys.readouterr().out == ''
    assert [row.candidate for row in rows] == ['ours', 'baseline', 'test_vit']
    assert ours.speedup_over_ours == baseline.speedup_over_baseline == 1 and peer.speedup_over_baseline is None
    assert 'maths' in baseline.kernels and ours.kernels
    assert ours.output_error == 0 and 0 < baseline.output_error < 0.05 and peer.output_error is None
    for row in rows:
        assert row.case == case and row.speedup_over_ours > 0 and row.peak_memory_mib > 0 and row.p95_ms >= row.ms > 0
        assert row.ceiling_tflop_per_s == ours.ceiling_tflop_per_s >= row.mm_tflop_per_s > 0
        assert row.repeats == 3 and row.machine.threads == 1
        assert all(value for name, value in asdict(row.machine).items() if name != 'gpu')


def test_training_is_measured_beside_a_step_of_pre_training():
    ours, baseline, step = measure(
        replace(PYRAMID, mode='train'), Asked(baseline=True, objective='clip', repeats=3))
    assert ours.gflop_per_image == baseline.gflop_per_image < step.gflop_per_image
    assert step.output_error is None and step.speedup_over_ours > 0


def test_rows_of_a_pyramid():
    asked = Asked(baseline=True, fuse=True, acceleration=('full',), repeats=3)
    case = replace(PYRAMID, img_size=(64, 96))
    rows = {row.candidate: row for row in measure(case, asked)}
    assert list(rows) == ['ours', 'ours fused', 'ours full', 'ours full fused', 'baseline']
    for name, row in rows.items():
        assert row.same_function is ('full' not in name)
        assert (row.output_error < 1e-3) is row.same_function
        assert row.speedup_over_ours > 0 and row.speedup_over_baseline > 0
    ours, fused, full, full_fused, baseline = (row.gflop_per_image for row in rows.values())
    assert full == full_fused < ours == fused == baseline


def test_module_against_ours_may_return_anything(tmp_path):
    (tmp_path / 'mine.py').write_text(
        'import torch.nn as nn\n'
        'class Maps(nn.Conv2d):\n'
        '    def forward(self, x):\n'
        "        return {'map': super().forward(x)}\n"
        'def build(**kwargs):\n'
        '    return Maps(3, 4, 16, 16)\n')
    _, row = measure(CASE, Asked(against=f'{tmp_path / "mine.py"}:build', repeats=3))
    assert row.output_error is None and row.speedup_over_ours > 0 and row.gflop_per_image > 0


@pytest.mark.slow  # importing everything once more
def test_case_in_a_process_of_its_own_has_the_same_threads():
    row, = measure_alone(CASE, Asked(repeats=3))
    assert row.machine.threads == 1 and row.case == CASE


def test_outputs_that_differ_give_no_ratio(monkeypatch, capsys):
    """A baseline that is wrong in one bias, and gives NaN."""
    class Wrong(candidates.Baseline):
        def load_state_dict(self, state):
            super().load_state_dict(state)
            self.blocks[0].mlp.fc1.bias.data += torch.nan

    monkeypatch.setattr(candidates, 'Baseline', Wrong)
    ours, baseline = measure(CASE, Asked(baseline=True, repeats=3))
    assert baseline.speedup_over_ours is None and not baseline.output_error < 1e-3
    assert ours.speedup_over_ours == 1 and ours.speedup_over_baseline is None
    assert 'baseline: the outputs differ from ours by' in capsys.readouterr().err


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


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure_file.time, 'perf_counter', lambda: clock.now_s)
    return clock


@pytest.mark.parametrize('warmup, expected', [(1, [1000, 2000, 4000]), (0, [9000, 1000, 2000])])
def test_calls_alternate_and_warmup_does_not_count(warmup, expected, clock):
    calls = {'a': clock.call('a', 9, 1, 2, 4), 'b': clock.call('b', 0.5)}
    times_ms = time_in_turn(calls, 3, warmup, 'cpu')
    assert ''.join(clock.log) == 'ab' * (3 + warmup)
    assert times_ms == {'a': expected, 'b': [500] * 3}


def test_device_is_waited_for_before_and_after_each_call(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'synchronize', clock.call('wait', 0.25))
    times_ms = time_in_turn({'a': clock.call('a', 1)}, 1, 0, 'cuda')
    assert clock.log == ['wait', 'a', 'wait'] and times_ms == {'a': [1250]}


def test_ratios_are_taken_round_by_round_and_the_range_is_relative_to_the_median(monkeypatch):
    times_ms = {'ours': [3, 1, 10, 2, 4], 'baseline': [6, 2, 20, 4.2, 7]}  # the machine slept in the third round
    monkeypatch.setattr(measure_file, 'rates', lambda *_: (1., 1.))
    monkeypatch.setattr(
        measure_file, 'time_in_turn', lambda calls, *_: {name: times_ms.get(name, [1.]) for name in calls})
    ours, baseline = measure(CASE, Asked(baseline=True, repeats=5))
    assert (ours.ms, ours.speedup_over_baseline) == (3, 2) and baseline.speedup_over_ours == 0.5
    assert ours.relative_iqr == pytest.approx(2 / 3) and ours.p95_ms == pytest.approx(8.8)


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def test_peak_is_what_was_in_use_at_once(device):
    def block(num_kib):
        return torch.empty(num_kib * KIB, dtype=torch.uint8, device=device)

    def call():
        a = block(4096)
        b = block(2048)
        del a
        c = block(2048)  # 4096 in use, after 6144
        return b, c

    assert peak_bytes(call, device) == 6144 * KIB
    before = block(4096)
    assert peak_bytes(before.clone, device) == 4096 * KIB
    assert peak_bytes(before.zero_, device) == 0


def test_gradients_count_and_weights_do_not(one_thread):
    layer = nn.Linear(256, 256, bias=False)
    x = torch.randn(1, 256)

    def call():
        layer(x).sum().backward()
        layer.zero_grad(set_to_none=True)

    weight = 256 * 256 * 4
    peak = peak_bytes(call, 'cpu')
    assert weight <= peak < 1.1 * weight and peak_bytes(call, 'cpu') == peak
    with torch.inference_mode():
        assert peak_bytes(lambda: layer(x), 'cpu') == 256 * 4


@pytest.mark.gpu
def test_cuda_rows():
    rows = measure(replace(CASE, dtype='bfloat16'), Asked(baseline=True, fuse=True, device='cuda', repeats=3))
    assert all(row.machine.gpu for row in rows)
    assert set(rows[0].kernels) <= {'flash', 'cuDNN'} and rows[0].kernels
    latency, = measure(replace(CASE, dtype='float16', mode='latency'), Asked(device='cuda', repeats=3))
    assert latency.p95_ms >= latency.ms > 0 and torch.cuda.is_available()

"""Rows of a case: complete, consistent, and without a ratio where outputs differ. No time is judged."""
from dataclasses import asdict, replace

import pytest
import torch

from timm_itpn.bench import candidates, ceiling
from timm_itpn.bench.cases import Candidates, Case, Rounds
from timm_itpn.bench.measure import measure, measure_alone

CASE = Case('fast_itpn_tiny', (32, 32), 2)
PYRAMID = Case('fast_itpn_tiny', (64, 64), 1, pyramid=True)
QUICK = Rounds(3, 1)

pytestmark = pytest.mark.usefixtures('one_thread', 'small_models')


@pytest.fixture(autouse=True)
def short_ceiling(monkeypatch):
    monkeypatch.setattr(ceiling, '_TARGET_FLOPS', {'cpu': 1e6, 'cuda': 1e6})


def test_rows_of_a_forward_case(capsys):
    case = replace(CASE, dtype='amp_bfloat16')
    rows = measure(case, Candidates(baseline=True, peers=('test_vit',)), QUICK, 'cpu')
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
        replace(PYRAMID, mode='train'), Candidates(baseline=True, objective='clip'), QUICK, 'cpu')
    assert ours.gflop_per_image == baseline.gflop_per_image < step.gflop_per_image
    assert step.output_error is None and step.speedup_over_ours > 0


def test_rows_of_a_pyramid():
    asked = Candidates(baseline=True, fuse=True, accelerations=('full',))
    case = replace(PYRAMID, img_size=(64, 96))
    rows = {row.candidate: row for row in measure(case, asked, QUICK, 'cpu')}
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
    _, row = measure(CASE, Candidates(against=f'{tmp_path / "mine.py"}:build'), QUICK, 'cpu')
    assert row.output_error is None and row.speedup_over_ours > 0 and row.gflop_per_image > 0


@pytest.mark.slow  # importing everything once more
def test_case_in_a_process_of_its_own_has_the_same_threads():
    row, = measure_alone(CASE, Candidates(), QUICK, 'cpu')
    assert row.machine.threads == 1 and row.case == CASE


def test_outputs_that_differ_give_no_ratio(monkeypatch, capsys):
    """A baseline that is wrong in one bias, and gives NaN."""
    class Wrong(candidates.Baseline):
        def load_state_dict(self, state):
            super().load_state_dict(state)
            self.blocks[0].mlp.fc1.bias.data += torch.nan

    monkeypatch.setattr(candidates, 'Baseline', Wrong)
    ours, baseline = measure(CASE, Candidates(baseline=True), QUICK, 'cpu')
    assert baseline.speedup_over_ours is None and not baseline.output_error < 1e-3
    assert ours.speedup_over_ours == 1 and ours.speedup_over_baseline is None
    assert 'baseline: the outputs differ from ours by' in capsys.readouterr().err


@pytest.mark.gpu
def test_cuda_rows():
    rows = measure(replace(CASE, dtype='bfloat16'), Candidates(baseline=True, fuse=True), QUICK, 'cuda')
    assert all(row.machine.gpu for row in rows)
    assert set(rows[0].kernels) <= {'flash', 'cuDNN'} and rows[0].kernels
    latency, = measure(replace(CASE, dtype='float16', mode='latency'), Candidates(), QUICK, 'cuda')
    assert latency.p95_ms >= latency.ms > 0 and torch.cuda.is_available()

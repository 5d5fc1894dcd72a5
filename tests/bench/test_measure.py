"""Rows of a case: complete, consistent, and without a ratio where outputs differ. No time is judged."""
import json

import pytest
import torch

from timm_itpn.bench import contestants
from timm_itpn.bench.cases import DTYPES, Case, Rivals, Rounds
from timm_itpn.bench.flops import count_flops
from timm_itpn.bench.measure import agrees, attention_of, describe, measure, timed, workload

CASE = Case('fast_itpn_tiny', 32, 2)
QUICK = Rounds(3, 1)

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('dtype', DTYPES)
def test_rows_of_a_forward_case(dtype, capsys):
    case = CASE._replace(dtype=dtype)
    ours, baseline, peer = measure(case, Rivals(baseline=True, peers=('test_vit',)), QUICK, 'cpu')
    assert capsys.readouterr().out == ''
    assert [row['contestant'] for row in (ours, baseline, peer)] == ['ours', 'baseline', 'test_vit']
    assert ours['ratio'] == 1 and ours['attention'] == 'sdpa' and baseline['attention'] is None
    assert baseline['speedup_over_baseline'] == 1 and peer['speedup_over_baseline'] is None
    assert 'maths' in baseline['kernels'] and ours['kernels']
    assert ours['output_error'] == 0 and 0 < baseline['output_error'] < 0.05 and peer['output_error'] is None
    for row in (ours, baseline, peer):
        assert {key: row[key] for key in Case._fields} == case._asdict()
        assert row['ratio'] > 0 and row['peak_memory_mib'] > 0 and row['spread'] >= 0
        assert row['ms_per_image'] == row['ms'] / 2 and row['p95_ms'] >= row['ms']
        assert row['images_per_s'] == pytest.approx(1000 / row['ms_per_image'])
        assert row['tflop_per_s'] == pytest.approx(row['gflop_per_image'] / row['ms_per_image'])
        assert row['share_of_ceiling'] == pytest.approx(row['tflop_per_s'] / row['ceiling_tflop_per_s'])
        assert row['ceiling_tflop_per_s'] == ours['ceiling_tflop_per_s'] >= row['mm_tflop_per_s'] > 0
        assert row['repeats'] == 3 and row['device'] == 'cpu' and row['threads'] == 1
        assert all(row[key] for key in ('machine', 'cpu', 'cores', 'python', 'torch', 'timm', 'timm_itpn', 'date'))
        assert json.loads(json.dumps(row)) == row


def test_training_counts_gradients_and_three_passes():
    forward, = measure(CASE, Rivals(), QUICK, 'cpu')
    plain, _ = measure(CASE._replace(mode='train'), Rivals(baseline=True), QUICK, 'cpu')
    case = CASE._replace(mode='train', grad_checkpointing=True)
    checkpointed, _ = measure(case, Rivals(baseline=True), QUICK, 'cpu')
    assert 2.9 < plain['gflop_per_image'] / forward['gflop_per_image'] < 3
    assert checkpointed['gflop_per_image'] == plain['gflop_per_image']
    weights_mib = 4 * sum(parameter.numel() for parameter in contestants.build_ours(CASE).parameters()) / 2 ** 20
    assert plain['peak_memory_mib'] > weights_mib > forward['peak_memory_mib']
    assert checkpointed['peak_memory_mib'] < plain['peak_memory_mib']


def test_step_of_training_leaves_no_gradients_and_moves_no_weights():
    ours = contestants.build(CASE._replace(mode='train'), Rivals(), 'cpu')[0]
    before = {key: value.clone() for key, value in ours.model.state_dict().items()}
    seen = []
    hook = next(ours.model.parameters()).register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm().item()))
    workload(ours, CASE._replace(mode='train'), torch.randn(2, 3, 32, 32), torch.tensor([3, 5]))()
    hook.remove()
    assert seen and seen[0] > 0
    assert all(parameter.grad is None for parameter in ours.model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in ours.model.state_dict().items())


def test_fused_model_counts_as_ours():
    ours, fused = measure(CASE, Rivals(fuse=True), QUICK, 'cpu')
    assert fused['contestant'] == 'ours fused' and fused['gflop_per_image'] == ours['gflop_per_image']
    assert 0 < fused['output_error'] < 1e-3 and fused['ratio'] > 0


def test_other_outputs_get_no_ratio(monkeypatch, capsys):
    """A baseline that errs a little in one bias."""
    build_baseline = contestants.build_baseline

    def broken(ours, case):
        baseline = build_baseline(ours, case)
        baseline.blocks[0].mlp.fc1.bias.data += 0.5
        return baseline

    monkeypatch.setattr(contestants, 'build_baseline', broken)
    ours, baseline = measure(CASE, Rivals(baseline=True), QUICK, 'cpu')
    assert baseline['output_error'] > 1e-3 and baseline['ratio'] is None
    assert ours['ratio'] == 1 and ours['speedup_over_baseline'] is None
    assert 'baseline: the outputs differ from ours by' in capsys.readouterr().err


def test_outputs_that_are_no_numbers_do_not_agree():
    assert agrees({'output_error': None}, CASE) and agrees({'output_error': 1e-5}, CASE)
    assert not agrees({'output_error': float('nan')}, CASE) and not agrees({'output_error': 0.01}, CASE)


@pytest.mark.parametrize('output_error, speedup', [(1e-6, 2), (None, None), (1., None)])
def test_row_follows_from_times(output_error, speedup):
    row = timed(
        {'gflop_per_image': 0.5, 'output_error': output_error}, CASE, times_ms=[4, 6, 5], ours_ms=[2, 2, 2],
        baseline_ms=[8, 6, 20], ceiling=1e12)
    assert (row['ms'], row['ms_per_image'], row['images_per_s']) == (5, 2.5, 400)
    assert row['spread'] == pytest.approx(0.2) and row['p95_ms'] == pytest.approx(5.9)
    assert row['tflop_per_s'] == pytest.approx(0.2) and row['share_of_ceiling'] == pytest.approx(0.2)
    assert row['ratio'] == (None if output_error == 1 else 2.5) and row['speedup_over_baseline'] == speedup


def test_model_without_attention_of_ours_shows_none():
    ours = contestants.build(CASE, Rivals(peers=('test_vit',)), 'cpu')
    assert [attention_of(contestant.model) for contestant in ours] == ['sdpa', None]
    row = describe(ours[1], ours[0], CASE, torch.randn(2, 3, 32, 32))
    assert row['gflop_per_image'] == count_flops(ours[1].model, torch.randn(1, 3, 32, 32)) / 1e9


@pytest.mark.gpu
def test_cuda_rows():
    rows = measure(CASE._replace(dtype='bfloat16'), Rivals(baseline=True, fuse=True), QUICK, 'cuda')
    assert all(row['gpu'] == row['machine'] for row in rows)
    assert set(rows[0]['kernels']) <= {'flash', 'cuDNN'} and rows[0]['kernels']
    latency, = measure(CASE._replace(dtype='float16', mode='latency'), Rivals(), QUICK, 'cuda')
    assert latency['p95_ms'] >= latency['ms'] > 0

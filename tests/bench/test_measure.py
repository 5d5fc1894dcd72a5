"""Rows of a case: complete, consistent, and without a ratio where outputs differ. No time is judged."""
import json
import math

import pytest
import torch

from timm_itpn.bench import contestants
from timm_itpn.bench.cases import DTYPES, Case, Rivals, Rounds
from timm_itpn.bench.flops import count_flops
from timm_itpn.bench.measure import agrees, attention_of, describe, measure, relative_error, timed, workload

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


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_rows_of_a_pyramid(dtype):
    case = Case('fast_itpn_tiny', '64x96', 1, dtype, pyramid=True)
    rivals = Rivals(baseline=True, fuse=True, accelerations=('light', 'full'))
    rows = {row['contestant']: row for row in measure(case, rivals, QUICK, 'cpu')}
    accelerated = ['ours light', 'ours light fused', 'ours full', 'ours full fused']
    assert list(rows) == ['ours', 'ours fused', *accelerated, 'baseline']
    ours, full, baseline = rows['ours'], rows['ours full'], rows['baseline']
    for name, row in rows.items():
        assert row['pyramid'] is True and row['size'] == '64x96'
        assert row['same_function'] is (name not in accelerated)
        assert row['ratio'] > 0 and row['speedup_over_baseline'] > 0 and row['peak_memory_mib'] > 0
        assert json.loads(json.dumps(row)) == row
    assert rows['ours fused']['output_error'] < 0.05 and baseline['output_error'] < 0.05
    assert full['output_error'] > 0.05 and rows['ours full fused']['output_error'] > 0.05
    assert baseline['gflop_per_image'] == ours['gflop_per_image'] == rows['ours fused']['gflop_per_image']
    assert rows['ours full fused']['gflop_per_image'] == full['gflop_per_image'] < ours['gflop_per_image']
    assert baseline['kernels'] == ['maths']


def test_step_of_pre_training_has_its_operations_and_a_ratio():
    case = Case('fast_itpn_tiny', 64, 1, mode='train', pyramid=True)
    ours, step = measure(case, Rivals(objective='clip'), QUICK, 'cpu')
    assert step['gflop_per_image'] > ours['gflop_per_image'] and step['ratio'] > 0 and step['output_error'] is None


def test_training_of_a_pyramid_counts_gradients():
    rivals = Rivals(baseline=True, accelerations=('full',))
    case = Case('fast_itpn_tiny', 64, 1, mode='train', pyramid=True)
    ours, full, baseline = measure(case, rivals, QUICK, 'cpu')
    checkpointed = measure(case._replace(grad_checkpointing=True), rivals, QUICK, 'cpu')
    assert ours['gflop_per_image'] == baseline['gflop_per_image'] > full['gflop_per_image']
    for plain, less in zip((ours, full, baseline), checkpointed):
        assert less['gflop_per_image'] == plain['gflop_per_image'] and less['ratio'] > 0
        assert less['peak_memory_mib'] < plain['peak_memory_mib']


def test_step_of_training_a_pyramid_has_a_gradient_everywhere():
    case = CASE._replace(pyramid=True, mode='train')
    ours, = contestants.build(case, Rivals(), 'cpu')
    seen = set()
    for name, parameter in ours.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.add(name))
    workload(ours, case, torch.randn(2, 3, 32, 32), torch.tensor([3, 5]))()
    assert seen == {name for name, _ in ours.model.named_parameters()}


def test_module_against_a_pyramid_may_return_anything(tmp_path):
    (tmp_path / 'mine.py').write_text(
        'import torch.nn as nn\n'
        'class Maps(nn.Conv2d):\n'
        '    def forward(self, x):\n'
        "        return {'map': super().forward(x)}\n"
        'def build():\n'
        '    return Maps(3, 4, 16, 16)\n')
    rivals = Rivals(against=f'{tmp_path / "mine.py"}:build')
    _, row = measure(CASE._replace(pyramid=True), rivals, QUICK, 'cpu')
    assert row['output_error'] is None and row['ratio'] > 0 and row['same_function'] is False


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


def test_outputs_of_another_function_need_not_agree():
    assert agrees({'output_error': 0.5, 'same_function': False}, CASE)
    assert not agrees({'output_error': 0.5, 'same_function': True}, CASE)


def test_error_is_that_of_the_worst_output():
    good, bad = torch.tensor([100., -100.]), torch.tensor([1., 1.])
    assert relative_error([good, bad], [good, 2 * bad]) == pytest.approx(0.5)
    assert math.isnan(relative_error([good, bad * float('nan')], [good, bad]))
    assert math.isnan(relative_error([bad * float('nan'), good], [bad, good]))


@pytest.mark.parametrize('output_error, same_function, speedup, ratio', [
    (1e-6, True, 2, 2.5), (None, False, None, 2.5), (1., True, None, None), (1., False, 2, 2.5)])
def test_row_follows_from_times(output_error, same_function, speedup, ratio):
    row = timed(
        {'gflop_per_image': 0.5, 'output_error': output_error, 'same_function': same_function}, CASE,
        times_ms=[4, 6, 5], ours_ms=[2, 2, 2], baseline_ms=[8, 6, 20], ceiling=1e12)
    assert (row['ms'], row['ms_per_image'], row['images_per_s']) == (5, 2.5, 400)
    assert row['spread'] == pytest.approx(0.2) and row['p95_ms'] == pytest.approx(5.9)
    assert row['tflop_per_s'] == pytest.approx(0.2) and row['share_of_ceiling'] == pytest.approx(0.2)
    assert row['ratio'] == ratio and row['speedup_over_baseline'] == speedup


def test_model_without_attention_of_ours_shows_none():
    ours = contestants.build(CASE, Rivals(peers=('test_vit',)), 'cpu')
    assert [attention_of(contestant.model) for contestant in ours] == ['sdpa', None]
    row = describe(ours[1], CASE, torch.randn(2, 3, 32, 32))
    assert row['gflop_per_image'] == count_flops(ours[1].model, torch.randn(1, 3, 32, 32)) / 1e9


@pytest.mark.gpu
def test_cuda_rows():
    rows = measure(CASE._replace(dtype='bfloat16'), Rivals(baseline=True, fuse=True), QUICK, 'cuda')
    assert all(row['gpu'] == row['machine'] for row in rows)
    assert set(rows[0]['kernels']) <= {'flash', 'cuDNN'} and rows[0]['kernels']
    latency, = measure(CASE._replace(dtype='float16', mode='latency'), Rivals(), QUICK, 'cuda')
    assert latency['p95_ms'] >= latency['ms'] > 0

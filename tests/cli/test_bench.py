"""The command `bench`: what it prints, writes and refuses. No time is judged."""
import json
import re

import pytest
import torch

from timm_itpn.bench import flops, rows
from timm_itpn.bench import measure as measure_file
from timm_itpn.bench.cases import Case, check
from timm_itpn.cli import bench, main

TINY = ('--model', 'fast_itpn_tiny', '--size', '32', '--batch', '1', '--repeats', '3')

pytestmark = pytest.mark.usefixtures('one_thread', 'small_models')


@pytest.fixture(autouse=True)
def short_ceiling(monkeypatch):
    monkeypatch.setattr(flops, '_TARGET_FLOPS', {'cpu': 1e6, 'cuda': 1e6})


def test_every_combination_is_a_case(monkeypatch, capsys):
    monkeypatch.setattr(measure_file, 'measure_alone', measure_file.measure)
    argv = ['bench', *TINY, '--baseline', '--mode', 'forward', 'latency']
    assert main(argv) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].startswith('fast_itpn_tiny, forward, 32 px, batch 1, float32; ceiling ')
    assert [line.split()[1] for line in lines[2:6]] == ['candidate', ':--------', 'ours', 'baseline']
    assert lines[7].startswith('fast_itpn_tiny, latency, 32 px') and '(p95 ' in lines[11]
    assert lines[-2].startswith('vs ours, vs baseline: ') and 'threads: 1' in lines[-1]
    assert re.search('rounds of ours, baseline: about [0-9]+ s\n', captured.err)


def test_rows_are_printed_recorded_and_drawn(tmp_path, capsys):
    path, picture = tmp_path / 'rows.jsonl', tmp_path / 'chart.png'
    argv = ['bench', *TINY, '--size', '32x48', '--pyramid', '--fuse', '--json']
    for _ in range(2):  # the second run replaces the rows of the first
        assert main([*argv, '--record', str(path), '--plot', str(picture)]) == 0
        recorded = rows.read(path, rows.Row)
        assert [row.candidate for row in recorded] == ['ours', 'ours fused']
        assert capsys.readouterr().out == path.read_text() and recorded[0].case.img_size == (32, 48)
    assert picture.stat().st_size > 1000 and len(list(tmp_path.iterdir())) == 2


def test_outputs_that_differ_are_an_error_after_the_rows(monkeypatch, capsys):
    monkeypatch.setattr(measure_file, 'TOLERANCES', {'float32': -1.})
    assert main(['bench', *TINY, '--baseline']) == 1
    captured = capsys.readouterr()
    assert 'outputs differ' in captured.out
    assert 'timm-itpn: outputs differ from ours: ours by 0, baseline by ' in captured.err


def test_suite_runs_its_lines(monkeypatch, tmp_path, capsys):
    (tmp_path / 'cpu.txt').write_text(' '.join(TINY))
    monkeypatch.setattr(bench, 'SUITES', tmp_path)
    assert main(['bench', '--suite', 'cpu', '--json', '--threads', '1']) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row['case']['img_size'], row['repeats'], row['machine']['threads']) == ([32, 32], 3, 1)


@pytest.mark.parametrize('name, num', [('cpu', 19), ('tracking', 7), ('gpu', 16)])
def test_every_case_of_a_suite_can_be_measured_and_is_listed_once(name, num):
    work = list(bench._suite(name, {}))
    for case, asked in work:
        check(case, asked)
        assert asked.device == ('cuda' if name == 'gpu' else 'cpu')
    assert len({case for case, _ in work}) == len(work) == num


def test_options_that_are_not_given_are_those_of_the_classes():
    given = {'mode': ['latency', 'train'], 'size': ['64x96'], 'baseline': True, 'peers': []}
    work = list(bench._asked_for(given))
    assert [case for case, _ in work] == [
        Case(img_size=(64, 96), batch=1, mode='latency'), Case(img_size=(64, 96), mode='train')]
    assert all(asked.baseline and asked.peers == bench.PEERS and not asked.fuse for _, asked in work)


@pytest.mark.parametrize('argv, message', [
    (['--pyramid', '--peers'], 'peers are classifiers: leave out --peers, or --pyramid and --templates'),
    (['--model', 'itpn_tiny', '--baseline'], 'itpn_tiny has no baseline, only fast_itpn_* models have one: leave out'),
    (['--mode', 'train', '--fuse'], 'a fused model cannot be trained: leave out --fuse, or the mode train'),
    (['--suite', 'cpu', '--size', '224', '--fuse', '--warmup', '1'], 'a suite is fixed: leave out --size, --fuse, --w'),
])
def test_what_excludes_each_other_is_said(argv, message, capsys):
    assert main(['bench', *argv]) == 1
    assert capsys.readouterr().err.startswith(f'timm-itpn: {message}')


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')
@pytest.mark.parametrize('argv', [['--suite', 'gpu'], ['--device', 'cuda']])
def test_missing_cuda_device_is_one_sentence(argv, capsys):
    assert main(['bench', *argv]) == 1
    assert capsys.readouterr().err.startswith("timm-itpn: device 'cuda' cannot be used: ")

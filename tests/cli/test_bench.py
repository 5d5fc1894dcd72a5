"""The command `bench`: what it prints, writes and refuses. No time is judged."""
import json
import re

import pytest
import torch

from timm_itpn.bench import ceiling, rows, suites
from timm_itpn.bench import measure as measure_file
from timm_itpn.bench.cases import Candidates, Case, Rounds
from timm_itpn.cli import main

TINY = ('--model', 'fast_itpn_tiny', '--size', '32', '--batch', '1', '--repeats', '3')

pytestmark = pytest.mark.usefixtures('one_thread', 'small_models')


def recorded(path):
    return rows.read(path, rows.Row.of_json)


@pytest.fixture(autouse=True)
def short_ceiling(monkeypatch):
    monkeypatch.setattr(ceiling, '_TARGET_FLOPS', {'cpu': 1e6, 'cuda': 1e6})


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
        printed = [rows.Row.of_json(**json.loads(line)) for line in capsys.readouterr().out.splitlines()]
        assert [row.candidate for row in printed] == ['ours', 'ours fused']
        assert recorded(path) == printed and printed[0].case.img_size == (32, 48)
    assert picture.stat().st_size > 1000 and len(list(tmp_path.iterdir())) == 2


def test_outputs_that_differ_are_an_error_after_the_rows(monkeypatch, capsys):
    monkeypatch.setattr(measure_file, 'TOLERANCES', {'float32': -1.})
    assert main(['bench', *TINY, '--baseline']) == 1
    captured = capsys.readouterr()
    assert 'outputs differ' in captured.out
    assert 'timm-itpn: outputs differ from ours: ours by 0, baseline by ' in captured.err


def test_suite_runs_its_cases_on_its_device(monkeypatch, capsys):
    work = Case('fast_itpn_tiny', (32, 32), 1), Candidates(), Rounds(3, 1)
    monkeypatch.setitem(suites.SUITES, 'cpu', [work])
    assert main(['bench', '--suite', 'cpu', '--json', '--threads', '1']) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row['case']['img_size'], row['repeats'], row['machine']['threads']) == ([32, 32], 3, 1)


@pytest.mark.parametrize('argv, message', [
    (['--pyramid', '--peers'], 'peers are classifiers: leave out --peers, or --pyramid and --templates'),
    (['--model', 'itpn_tiny', '--baseline'], 'itpn_tiny has no baseline, only fast_itpn_* models have one: leave out'),
    (['--repeats', '0'], '0 repeats are too few for a median: ask for at least 3'),
    (['--mode', 'train', '--fuse'], 'a fused model cannot be trained: leave out --fuse, or the mode train'),
    (['--suite', 'cpu', '--size', '224', '--fuse', '--warmup', '1'], 'a suite is fixed: leave out --size, --fuse, --w'),
])
def test_what_excludes_each_other_is_said(argv, message, capsys):
    assert main(['bench', *argv]) == 1
    assert capsys.readouterr().err.startswith(f'timm-itpn: {message}')


@pytest.mark.parametrize('argv', [['--suite', 'gpu'], ['--device', 'cuda']])
def test_missing_cuda_device_is_one_sentence(argv, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert main(['bench', *argv]) == 1
    assert capsys.readouterr().err == (
        'timm-itpn: there is no CUDA device: measure with --device cpu, or --suite cpu\n')

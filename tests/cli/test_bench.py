"""The command `bench`: what it prints, writes and refuses. No time is judged."""
import json

import pytest
import torch

from timm_itpn.bench import ceiling, rows, suites
from timm_itpn.bench import measure as measure_file
from timm_itpn.bench.cases import Candidates, Case, Rounds
from timm_itpn.cli import main

TINY = ('--model', 'fast_itpn_tiny', '--size', '32', '--batch', '1', '--repeats', '3')

pytestmark = pytest.mark.usefixtures('one_thread')


def recorded(path):
    return rows.read(path, rows.Row.of_json)


@pytest.fixture(autouse=True)
def short_ceiling(monkeypatch):
    monkeypatch.setattr(ceiling, '_TARGET_FLOPS', {'cpu': 1e6, 'cuda': 1e6})


def test_every_combination_is_a_case(capfd):
    argv = ['bench', *TINY, '--baseline', '--mode', 'forward', 'latency']
    assert main(argv) == 0
    captured = capfd.readouterr()  # not capsys: several cases run in a process each
    lines = captured.out.splitlines()
    assert lines[0].startswith('fast_itpn_tiny, forward, 32 px, batch 1, float32; ceiling ')
    assert [line.split()[1] for line in lines[2:6]] == ['candidate', ':--------', 'ours', 'baseline']
    assert lines[7].startswith('fast_itpn_tiny, latency, 32 px') and '(p95 ' in lines[11]
    assert 'threads: 1' in lines[-1] and 'rounds of ours, baseline' in captured.err


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
    (['--model', 'resnet50'], "there is no model 'resnet50'; there are: fast_itpn_base, "),
    (['--size', '100'], 'images of 100 x 100 pixels are not usable: sides must be multiples of 16'),
    (['--size', '0'], 'images of 0 x 0 pixels are not usable'),
    (['--size', 'big'], 'size big is not usable: give a side such as 224, or HEIGHTxWIDTH such as 800x1344'),
    (['--pyramid', '--peers'], 'peers are classifiers and cannot be compared with a pyramid: leave out --peers or'),
    (['--model', 'itpn_tiny', '--baseline'], 'itpn_tiny has no baseline, only fast_itpn_* models have one: leave out'),
    (['--batch', '0'], 'batch 0 is not usable: it must be at least 1'),
    (['--repeats', '2'], '2 repeats are too few for a median: ask for at least 3'),
    (['--warmup', '0'], '0 rounds of warm-up are too few: ask for at least 1'),
    (['--threads', '0'], '0 threads are not usable: ask for at least 1'),
    (['--mode', 'train', '--fuse'], 'a fused model cannot be trained: leave out --fuse, or the mode train'),
    (['--acceleration', 'more'], "acceleration 'more' is unknown, use one of ('light', 'full') or None"),
    ([*TINY, '--against', 'nope.py:build'], '--against nope.py:build: there is no file nope.py'),
    (['--suite', 'cpu', '--size', '224', '--fuse'], 'a suite is fixed: leave out --size, --fuse'),
    (['--plot', 'chart.jpg'], 'chart.jpg is not a PNG file name; --plot must end in .png'),
    (['--record', 'nope/rows.jsonl'], 'nope/rows.jsonl cannot be written: there is no folder nope'),
])
def test_bad_input_is_one_sentence(argv, message, capsys):
    assert main(['bench', *argv]) == 1
    captured = capsys.readouterr()
    assert captured.out == ''
    assert captured.err.splitlines()[-1].startswith(f'timm-itpn: {message}')


@pytest.mark.parametrize('argv', [['--suite', 'gpu'], ['--device', 'cuda']])
def test_missing_cuda_device_is_one_sentence(argv, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert main(['bench', *argv]) == 1
    assert capsys.readouterr().err == (
        'timm-itpn: there is no CUDA device: measure with --device cpu, or --suite cpu\n')

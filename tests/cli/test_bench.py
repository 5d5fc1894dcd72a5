"""The command `bench`: what it prints, writes and refuses. No time is judged."""
import argparse
import json
import sys

import pytest
import torch

from timm_itpn.bench import measure as measure_file
from timm_itpn.bench import rows, suites
from timm_itpn.bench.cases import MODES, PEERS, Case, Rivals, Rounds
from timm_itpn.bench.machine import facts
from timm_itpn.cli import bench, main

TINY = ('--model', 'fast_itpn_tiny', '--size', '32', '--batch', '1', '--repeats', '3')

pytestmark = pytest.mark.usefixtures('one_thread')


def parsed(*argv):
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    return parser.parse_args(['bench', *argv])


def cases(*argv):
    return [case for case, _, _ in bench.asked_for(parsed(*argv))]


def test_defaults():
    (case, rivals, rounds), = bench.asked_for(parsed())
    assert case == Case('fast_itpn_base', 224, 8, 'float32', 'forward') and rivals == Rivals() and rounds == Rounds()
    assert cases('--mode', 'latency')[0].batch == 1


def test_every_combination_is_a_case():
    asked = cases('--size', '224', '512', '--batch', '2', '4', '--dtype', 'float32', 'bfloat16', '--mode', *MODES)
    assert len(asked) == len(set(asked)) == 2 * 2 * 2 * 3
    assert [case.batch for case in cases('--mode', 'forward', 'latency')] == [8, 1]


def test_sizes_and_what_is_measured_are_read():
    asked = cases('--size', '224', '800x1344', '64x64', '--pyramid')
    assert [case.size for case in asked] == [224, '800x1344', 64] and all(case.pyramid for case in asked)
    (case, rivals, _), = bench.asked_for(parsed('--acceleration', 'full', 'light'))
    assert rivals == Rivals(accelerations=('full', 'light')) and not case.pyramid


def test_rivals_are_read():
    (_, rivals, rounds), = bench.asked_for(
        parsed('--baseline', '--fuse', '--compile', 'max-autotune', '--peers', '--against', 'a.py:f', '--repeats', '4'))
    assert rivals == Rivals(True, True, 'max-autotune', PEERS, 'a.py:f') and rounds == Rounds(4, 0)
    (_, rivals, _), = bench.asked_for(parsed('--peers', 'test_vit', '--compile'))
    assert rivals == Rivals(compile='default', peers=('test_vit',))


def test_table_is_on_stdout_and_progress_on_stderr(capsys):
    assert main(['bench', *TINY, '--baseline', '--mode', 'forward', 'latency']) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].startswith('fast_itpn_tiny, forward, 32 px, batch 1, float32; ceiling ')
    assert lines[1].split()[:2] == ['contestant', 'ms/image'] and lines[1].endswith('attention kernel')
    assert [line.split()[0] for line in lines[2:4]] == ['ours', 'baseline']
    assert lines[3].endswith('maths') and '(p95 ' not in lines[2]
    assert lines[5].startswith('fast_itpn_tiny, latency') and '(p95 ' in lines[7]
    assert lines[-1] == rows.setting(facts('cpu'))
    assert 'rounds of ours, baseline' in captured.err and len(captured.err.splitlines()) == 12


def test_json_lines_are_recorded_and_drawn(tmp_path, capsys):
    path, picture = tmp_path / 'rows.jsonl', tmp_path / 'chart.png'
    argv = ['bench', *TINY, '--peers', 'test_vit', '--json', '--record', str(path), '--plot', str(picture)]
    for _ in range(2):
        assert main(argv) == 0
        printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row['contestant'] for row in printed] == ['ours', 'test_vit']
        assert rows.read(path) == printed  # the second run replaces the rows of the first
    assert picture.stat().st_size > 1000 and len(list(tmp_path.iterdir())) == 2


def test_pyramid_and_accelerations_are_shown_recorded_and_drawn(tmp_path, capsys):
    path, picture = tmp_path / 'rows.jsonl', tmp_path / 'chart.png'
    argv = ['bench', *TINY, '--size', '32x48', '--pyramid', '--baseline', '--fuse', '--acceleration', 'full']
    assert main([*argv, '--record', str(path), '--plot', str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('fast_itpn_tiny, pyramid, forward, 32x48 px, batch 1, float32; ceiling ')
    names = ['ours', 'ours fused', 'ours full', 'ours full fused', 'baseline']
    assert [line.split('  ')[0] for line in lines[2:7]] == names and lines[7] == ''
    assert [row['contestant'] for row in rows.read(path)] == names
    assert {row['size'] for row in rows.read(path)} == {'32x48'} and picture.stat().st_size > 1000


def test_against_takes_part(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('sys.path', list(sys.path))
    file = tmp_path / 'mine.py'
    file.write_text(
        'import torch.nn as nn\n'
        'def build(img_size, num_classes):\n'
        '    return nn.Sequential(nn.Flatten(), nn.Linear(3 * img_size[0] * img_size[1], num_classes))\n')
    assert main(['bench', *TINY, '--against', f'{file}:build', '--json']) == 0
    _, mine = map(json.loads, capsys.readouterr().out.splitlines())
    assert mine['contestant'] == f'{file}:build' and mine['kernels'] == [] and mine['ratio'] > 0
    assert mine['gflop_per_image'] == pytest.approx(2 * 3 * 32 * 32 * 1000 / 1e9)


def test_outputs_that_differ_are_an_error_after_the_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure_file, 'TOLERANCES', {'float32': -1.})
    assert main(['bench', *TINY, '--baseline']) == 1
    captured = capsys.readouterr()
    assert 'outputs differ' in captured.out
    assert 'timm-itpn: outputs differ from ours, so there is no ratio: ours by 0, baseline by ' in captured.err


def test_committed_rows_are_printed_as_markdown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, 'MEASURED', tmp_path / 'measured.jsonl')
    assert main(['bench', '--measured']) == 1
    assert 'no measured rows come with this version' in capsys.readouterr().err
    assert main(['bench', *TINY, '--record', str(tmp_path / 'measured.jsonl')]) == 0
    capsys.readouterr()
    assert main(['bench', '--measured']) == 0
    assert capsys.readouterr().out == f'{rows.markdown_table(rows.read(tmp_path / "measured.jsonl"))}\n'


def test_suite_runs_its_cases_on_its_device(monkeypatch, capsys, one_thread):
    monkeypatch.setattr(suites, 'SUITES', {'cpu': [(Case('fast_itpn_tiny', 32, 1), Rivals(), Rounds(3, 1))]})
    assert main(['bench', '--suite', 'cpu', '--json', '--threads', '1']) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row['size'], row['device'], row['repeats'], row['threads']) == (32, 'cpu', 3, 1)


@pytest.mark.parametrize('argv, message', [
    (['--model', 'resnet50'], "there is no model 'resnet50'; there are: fast_itpn_base, "),
    (['--size', '100'], 'size 100 is not usable: it must be a multiple of 16'),
    (['--size', '0'], 'size 0 is not usable'),
    (['--size', '800x1340'], 'size 800x1340 is not usable: each side must be a multiple of 16'),
    (['--size', 'big'], 'size big is not usable: give a side such as 224, or HEIGHTxWIDTH such as 800x1344'),
    (['--pyramid', '--peers'], 'the peers are classifiers, which a pyramid cannot be compared with'),
    (['--pyramid', '--model', 'itpn_tiny', '--baseline', '--size', '32'], 'itpn_tiny has no baseline'),
    (['--batch', '0'], 'batch 0 is not usable'),
    (['--repeats', '2'], '2 repeats are too few for a median: ask for at least 3'),
    (['--repeats', '0'], '--repeats 0 is not usable'),
    (['--warmup', '-1'], '-1 rounds of warm-up are not usable'),
    (['--threads', '0'], '0 threads are not usable'),
    (['--mode', 'train', '--fuse'], 'a fused model cannot be trained: leave out --fuse, or the mode train'),
    (['--grad-checkpointing'], 'gradient checkpointing has no effect in the mode forward'),
    (['--model', 'itpn_tiny', '--baseline', '--size', '32'], 'itpn_tiny has no baseline'),
    (['--model', 'fast_itpn_tiny', '--peers', 'nope', '--size', '32'], "timm has no model 'nope'"),
    (['--suite', 'cpu', '--size', '224', '--fuse'], 'a suite is fixed: leave out --size, --fuse'),
    (['--suite', 'cpu', '--pyramid', '--acceleration', 'full'],
     'a suite is fixed: leave out --pyramid, --acceleration'),
    (['--plot', 'chart.jpg'], 'chart.jpg is no name of a PNG file'),
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

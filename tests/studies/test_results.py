"""The tables of the studies."""
from pathlib import Path

import pytest

from timm_itpn.bench.rows import Machine
from timm_itpn.cli import main
from timm_itpn.studies import STUDIES, results
from timm_itpn.studies.results import Row

MACHINE = Machine('A CPU', None, 4, 2, '3.11.7', '2.15.0', '1.0.31', '0.1.0', '2026-01-02')


def row(arm, measured, seed, top1, miou):
    return Row(arm, measured, seed, {'top-1': top1, 'mIoU': miou}, MACHINE)


def test_table_has_means_over_seeds_and_differences_of_the_same_seeds():
    rows = [
        row('off', 'as it is', 0, 90., 50.), row('full', 'as it is', 0, 80., 40.),
        row('off', 'tuned', 0, 92., 60.), row('full', 'tuned', 0, 91., 58.),
        row('off', 'as it is', 1, 92., 54.), row('off', 'tuned', 1, 94., 62.),
    ]
    assert results.markdown('acceleration', rows) == """\
A CPU, threads: 2, cores: 4; Python 3.11.7, torch 2.15.0, timm 1.0.31, timm-itpn 0.1.0; 2026-01-02:

| arm  | top-1, as it is | mIoU, as it is |  top-1, tuned |   mIoU, tuned | seeds |
| :--- | --------------: | -------------: | ------------: | ------------: | ----: |
| off  |           91.00 |          52.00 |         93.00 |         61.00 |     2 |
| full |  80.00 (-10.00) | 40.00 (-10.00) | 91.00 (-1.00) | 58.00 (-2.00) |     1 |"""


def test_results_are_those_of_the_committed_rows(capsys):
    assert main(['evidence', '--measured']) == 0
    assert Path(results.__file__).with_name('RESULTS.md').read_text() == capsys.readouterr().out


@pytest.mark.parametrize('name', STUDIES)
def test_every_arm_has_committed_rows(name):
    assert {row.arm for row in results.measured(name)} == set(results.load(name).ARMS)


def test_chart_shows_speed_and_differences_of_the_committed_rows(tmp_path, capsys):
    axes, = results.draw().axes
    allowed, *lines = axes.lines
    assert set(allowed.get_ydata()) == {-0.5}
    shown = {line.get_label(): line.get_xydata().tolist() for line in lines}
    assert list(shown) == [
        f'{score}, {tokens}' for score in ('mIoU', 'top-1', 'box AP') for tokens in ('carried', 'stored')]
    tables = results.markdown('acceleration', results.measured('acceleration'))
    for label, ((off, zero), light, full) in shown.items():
        assert (off, zero) == (1, 0) and 1 < light[0] < full[0]
        if label.startswith('mIoU'):
            assert f'({full[1]:+.2f})' in tables
    path = tmp_path / 'chart.png'
    assert main(['evidence', '--measured', '--plot', str(path)]) == 0
    assert path.stat().st_size > 1000 and capsys.readouterr().err == f'{path}\n'


@pytest.mark.parametrize('argv, message', [
    (['--plot', 'x.png'], '--plot draws what comes with the package: use it with --measured'),
    ([], 'name an experiment, one of: acceleration, photographs, pretraining, detection'),
    (['pretraining', '--record', 'nope/rows.jsonl'], 'nope/rows.jsonl cannot be written: there is no folder nope'),
])
def test_bad_input_is_one_sentence(argv, message, capsys):
    assert main(['evidence', *argv]) == 1
    assert capsys.readouterr().err == f'timm-itpn: {message}\n'

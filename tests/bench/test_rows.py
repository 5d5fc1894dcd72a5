"""Rows as tables and charts, and in files; the committed ones are what the tables say."""
from dataclasses import replace
from pathlib import Path

import pytest

from timm_itpn.bench import rows
from timm_itpn.bench.cases import Case
from timm_itpn.bench.rows import Machine, Row
from timm_itpn.cli import main

MACHINE = Machine('A CPU', None, 4, 2, '3.11.7', '2.15.0', '1.0.31', '0.1.0', '2026-01-02')
ROW = Row(
    case=Case('fast_itpn_tiny', (32, 32), 2), candidate='ours', same_function=True, gflop_per_image=0.2,
    kernels=['flash'], output_error=0., peak_memory_mib=2.25, ms=20., p95_ms=22., relative_iqr=0.0123,
    speedup_over_ours=1., speedup_over_baseline=None, ceiling_tflop_per_s=0.04, mm_tflop_per_s=0.03, repeats=3,
    warmup=1, machine=MACHINE)
BASELINE = replace(ROW, candidate='baseline', ms=30., speedup_over_ours=0.5)


def test_table_names_machine_case_and_ceiling():
    gpu = replace(
        ROW, machine=replace(MACHINE, gpu='B GPU'), case=replace(ROW.case, mode='latency'), peak_memory_mib=None,
        speedup_over_ours=None, speedup_over_baseline=1.5, kernels=['cuDNN'])
    assert rows.markdown([gpu, ROW, BASELINE]) + '\n' == """\
vs ours, vs baseline: the time of that one divided by the time of this one; above 1x, this one is faster

## A CPU, threads: 2, cores: 4; Python 3.11.7, torch 2.15.0, timm 1.0.31, timm-itpn 0.1.0; 2026-01-02

fast_itpn_tiny, forward, 32 px, batch 2, float32; ceiling 0.04 TFLOP/s (`torch.mm` alone 0.03):

| candidate | ms/image | images/s | vs ours | vs baseline | TFLOP/s | of ceiling | peak MiB |  IQR | kernels |
| :-------- | -------: | -------: | ------: | ----------: | ------: | ---------: | -------: | ---: | ------: |
| ours      |       10 |      100 |   1.00x |             |    0.02 |        50% |      2.2 | 1.2% |   flash |
| baseline  |       15 |    66.67 |   0.50x |             | 0.01333 |        33% |      2.2 | 1.2% |   flash |

## B GPU; Python 3.11.7, torch 2.15.0, timm 1.0.31, timm-itpn 0.1.0; 2026-01-02

fast_itpn_tiny, latency, 32 px, batch 2, float32; ceiling 0.04 TFLOP/s (`torch.mm` alone 0.03):

| candidate |    ms/image | images/s |        vs ours | vs baseline | TFLOP/s | of ceiling | peak MiB |  IQR | kernels |
| :-------- | ----------: | -------: | -------------: | ----------: | ------: | ---------: | -------: | ---: | ------: |
| ours      | 10 (p95 11) |      100 | outputs differ |       1.50x |    0.02 |        50% |          | 1.2% |   cuDNN |
"""


def test_bars_and_ceiling_are_at_their_values():
    large = replace(ROW, case=replace(ROW.case, img_size=(64, 96)), ms=80.)
    first, second = rows.draw([ROW, BASELINE, large]).axes
    assert [[bar.get_width() for bar in axes.patches] for axes in (first, second)] == [[10, 15], [40]]
    assert [label.get_text() for label in first.get_yticklabels()] == ['ours', 'baseline']
    assert list(first.lines[0].get_xdata()) == pytest.approx([5, 5])
    assert first.get_title().startswith(str(ROW.case)) and '64x96 px' in second.get_title()


def test_recorded_row_replaces_the_one_of_the_same_case_candidate_and_processor(tmp_path):
    path = tmp_path / 'rows.jsonl'
    others = [
        BASELINE, replace(ROW, case=replace(ROW.case, pyramid=True)), replace(ROW, machine=replace(MACHINE, gpu='B'))]
    rows.record(path, [ROW, *others])
    newer = replace(ROW, ms=5., machine=replace(MACHINE, torch='3.0'))
    rows.record(path, [newer])
    assert rows.read(path, Row) == [newer, *others] and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('text', ['no json', '{"a": 1}', '[1]', '3', '{"case": {}, "machine": {}}'])
def test_file_of_something_else_is_refused(text, tmp_path):
    path = tmp_path / 'rows.jsonl'
    path.write_text(text)
    with pytest.raises(ValueError, match='rows.jsonl is not a file of measured rows, one JSON object per line'):
        rows.record(path, [ROW])
    assert path.read_text() == text


def test_results_are_those_of_the_committed_rows(capsys):
    assert main(['bench', '--measured']) == 0
    assert Path(rows.__file__).with_name('RESULTS.md').read_text() == capsys.readouterr().out

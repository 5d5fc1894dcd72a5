"""Rows as Markdown, and in files."""
import json
from pathlib import Path

import pytest

from timm_itpn.bench import rows
from timm_itpn.bench.cases import Case

ROW = {
    **Case('fast_itpn_tiny', 32, 2)._asdict(),
    'contestant': 'ours', 'same_function': True, 'gflop_per_image': 0.2, 'attention': 'sdpa', 'kernels': ['flash'],
    'output_error': 0., 'peak_memory_mib': 2.25, 'ms': 20., 'p95_ms': 22., 'spread': 0.0123, 'ms_per_image': 10.,
    'images_per_s': 100., 'tflop_per_s': 0.02, 'ceiling_tflop_per_s': 0.04, 'share_of_ceiling': 0.5, 'ratio': 1.,
    'repeats': 3, 'warmup': 1,
    'speedup_over_baseline': None, 'device': 'cpu', 'machine': 'A CPU', 'cpu': 'A CPU', 'gpu': None, 'cores': 4,
    'threads': 2, 'python': '3.11.7', 'torch': '2.15.0', 'timm': '1.0.31', 'timm_itpn': '0.1.0', 'date': '2026-01-02',
}
OLD = {key: value for key, value in ROW.items() if key not in ('pyramid', 'same_function')}


def test_markdown_names_machine_versions_and_date_above_each_table():
    gpu = dict(ROW, machine='A GPU', gpu='A GPU', mode='latency', peak_memory_mib=None, kernels=['flash'])
    header = """\
| case | contestant | ms/image | vs ours | vs baseline | TFLOP/s | of ceiling | peak MiB | spread | attention kernel |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""
    other = dict(ROW, contestant='x', ratio=None, speedup_over_baseline=0.5, kernels=['cuDNN', 'flash'])
    assert rows.markdown_table([gpu, ROW, other]) == f"""\
A CPU, threads: 2, cores: 4; python 3.11.7, torch 2.15.0, timm 1.0.31, timm_itpn 0.1.0; 2026-01-02:

{header}\
| fast_itpn_tiny, forward, 32 px, batch 2, float32 | ours | 10 | 1.00x |  | 0.02 | 50% | 2.2 | 1.2% | flash |
|  | x | 10 |  | 0.50x | 0.02 | 50% | 2.2 | 1.2% | cuDNN, flash |

A GPU; python 3.11.7, torch 2.15.0, timm 1.0.31, timm_itpn 0.1.0; 2026-01-02:

{header}\
| fast_itpn_tiny, latency, 32 px, batch 2, float32 | ours | 10 (p95 22) | 1.00x |  | 0.02 | 50% |  | 1.2% | flash |"""


@pytest.mark.parametrize('contestant, ratio, expected', [
    ('ours', 1., '1.00x'), ('ours full fused', 0.5, '2.00x'), ('ours fused', None, ''), ('baseline', 1.2, ''),
    ('ours.py:build', 0.5, '')])
def test_speed_against_ours_is_shown_for_what_is_made_of_it(contestant, ratio, expected):
    row = dict(ROW, contestant=contestant, ratio=ratio)
    assert rows.cells(row, ['vs ours', 'contestant']) == (expected, contestant)
    assert len(rows.cells(row)) == len(rows.HEADER) and 'vs ours' not in rows.HEADER


def test_old_rows_are_read():
    assert rows.case_of(OLD) == rows.case_of(ROW) and rows.key(OLD) == rows.key(ROW)
    assert rows.markdown_table([OLD]) == rows.markdown_table([ROW])
    assert rows.same_function(OLD) and not rows.same_function(dict(OLD, output_error=None))
    assert not rows.same_function(dict(ROW, same_function=False))
    with pytest.raises(KeyError, match='model'):
        rows.case_of({key: value for key, value in OLD.items() if key != 'model'})


def test_new_rows_replace_old_ones_of_the_same_case(tmp_path):
    path = tmp_path / 'rows.jsonl'
    path.write_text(f'{json.dumps(OLD)}\n')
    pyramid = dict(ROW, pyramid=True, size='32x64')
    rows.record(path, [pyramid])
    assert rows.read(path) == [OLD, pyramid]
    newer = dict(ROW, ms=5.)
    rows.record(path, [newer])
    assert rows.read(path) == [newer, pyramid]


def test_recorded_row_replaces_the_one_of_the_same_case_contestant_and_machine(tmp_path):
    path = tmp_path / 'rows.jsonl'
    others = [
        dict(ROW, contestant='baseline'), dict(ROW, size=48), dict(ROW, grad_checkpointing=True),
        dict(ROW, machine='A GPU')]
    rows.record(path, [ROW, *others])
    assert rows.read(path) == [ROW, *others]
    newer = dict(ROW, ms=5., torch='3.0', date='2027-01-01')
    rows.record(path, [newer, dict(ROW, batch=4)])
    assert rows.read(path) == [newer, *others, dict(ROW, batch=4)]
    assert len(path.read_text().splitlines()) == 6 and [p.name for p in tmp_path.iterdir()] == ['rows.jsonl']


def test_failed_record_leaves_the_file_alone(tmp_path):
    path = tmp_path / 'rows.jsonl'
    rows.record(path, [ROW])
    with pytest.raises(TypeError):
        rows.record(path, [dict(ROW, size=48, ms=object())])
    assert rows.read(path) == [ROW] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize('text', ['no json', '{"a": 1}', '[1]', '3'])
def test_file_of_something_else_is_refused(text, tmp_path):
    path = tmp_path / 'rows.jsonl'
    path.write_text(text)
    with pytest.raises(ValueError, match='rows.jsonl is no file of measured rows, one JSON object per line'):
        rows.record(path, [ROW])
    assert path.read_text() == text


def test_readme_quotes_the_committed_rows():
    readme = (Path(__file__).parents[2] / 'README.md').read_text()
    assert rows.markdown_table(rows.measured()) in readme


def test_missing_rows_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, 'MEASURED', tmp_path / 'measured.jsonl')
    with pytest.raises(RuntimeError, match='^no measured rows come with this version'):
        rows.measured()
    (tmp_path / 'measured.jsonl').write_text(f'{json.dumps(ROW)}\n')
    assert rows.measured() == [ROW]

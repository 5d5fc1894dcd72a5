"""The tables of the experiments."""
from pathlib import Path

import pytest

from timm_itpn.cli.evidence import STUDIES
from timm_itpn.studies import evidence

FACTS = {
    'machine': 'A CPU', 'cpu': 'A CPU', 'gpu': None, 'cores': 4, 'threads': 2, 'python': '3.11.7', 'torch': '2.15.0',
    'timm': '1.0.31', 'timm_itpn': '0.1.0', 'date': '2026-01-02'}


def row(setting, tuned, seed, top1, miou):
    return {'setting': setting, 'tuned': tuned, 'seed': seed, 'top1': top1, 'miou': miou, **FACTS}


def test_table_has_means_over_seeds_and_what_is_lost():
    rows = [
        row('off', False, 0, 90., 50.), row('full', False, 0, 80., 40.), row('swept', False, 0, 70., 30.),
        row('off', True, 0, 92., 60.), row('full', True, 0, 91., 58.),
        row('off', False, 1, 92., 54.), row('full', False, 1, 84., 42.),
        row('off', True, 1, 94., 62.), row('full', True, 1, 93.5, 61.),
    ]
    assert evidence.markdown('acceleration', rows) == """\
A CPU, threads: 2, cores: 4; python 3.11.7, torch 2.15.0, timm 1.0.31, timm_itpn 0.1.0; 2026-01-02:

| setting | top-1 as it is | mIoU as it is | top-1 tuned | against off | mIoU tuned | against off | seeds |
| --- | --- | --- | --- | --- | --- | --- | --- |
| off | 91.00 | 52.00 | 93.00 |  | 61.00 |  | 2 |
| full | 82.00 | 41.00 | 92.25 | -0.75 | 59.50 | -1.50 | 2 |
| swept | 70.00 | 30.00 |  |  |  |  | 1 |"""


def test_only_the_same_seeds_are_compared():
    rows = [row('off', True, 0, 90., 50.), row('off', True, 1, 94., 50.), row('one', True, 0, 89., 50.)]
    assert '| one |  |  | 89.00 | -1.00 |' in evidence.markdown('acceleration', rows)


@pytest.mark.parametrize('name', evidence.STUDIES)
def test_readme_quotes_the_committed_rows(name):
    readme = (Path(__file__).parents[2] / 'README.md').read_text()
    assert evidence.markdown(name, evidence.committed(name)) in readme


def test_command_knows_the_studies():
    assert STUDIES == tuple(evidence.STUDIES)


def test_missing_rows_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, 'FOLDER', tmp_path)
    with pytest.raises(RuntimeError, match='^no measured rows come with this version'):
        evidence.committed('acceleration')

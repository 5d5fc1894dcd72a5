"""The experiment on detection, much shortened."""
from concurrent.futures import ThreadPoolExecutor

import pytest

from timm_itpn.bench.rows import read
from timm_itpn.cli import main
from timm_itpn.studies import detection, results
from timm_itpn.studies.canvases import draw
from timm_itpn.studies.two_tasks import Training

pytestmark = pytest.mark.usefixtures('one_thread')


def test_command_measures_starts_and_acceleration_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(detection, '_FOLDER', tmp_path / 'runs')
    monkeypatch.setattr(detection, '_SPLITS', {
        name: {**options, 'num': 4 if name.endswith('train') else 1} for name, options in detection._SPLITS.items()})
    monkeypatch.setattr(detection, '_MODEL', dict(detection._MODEL, depths=(1, 1, 2)))
    monkeypatch.setattr(detection, '_PRETRAINING', Training(1, 2, 1e-3))
    monkeypatch.setattr(detection, '_TRAINING', dict(detection._TRAINING, epochs=1))
    starts = ('pixel', 'pixel, new pyramid')
    monkeypatch.setattr(detection, '_STARTS', {name: detection._STARTS[name] for name in starts})
    monkeypatch.setattr(detection, 'draw', lambda *args, num, **kwargs: draw(*args, num=4, **kwargs))
    monkeypatch.setattr(detection, '_ACCELERATION', {'pixel, full': detection._ACCELERATION['pixel, full']})
    monkeypatch.setattr(results, 'ProcessPoolExecutor', lambda *_: ThreadPoolExecutor(1))
    found = []
    for name in ('rows.jsonl', 'again.jsonl'):
        assert main(['evidence', 'detection', '--seeds', '3', '--record', str(tmp_path / name)]) == 0
        found.append(read(tmp_path / name, results.Row))
    assert [(row.arm, row.measured) for row in found[0]] == [
        ('pixel', 'trained'), ('pixel, new pyramid', 'trained'), ('pixel, full', 'larger images'),
        ('pixel, full', 'tuned to them')]
    assert [row.scores for row in found[0]] == [row.scores for row in found[1]]  # nothing is trained again
    assert capsys.readouterr().out.count('| box AP, trained |') == 2

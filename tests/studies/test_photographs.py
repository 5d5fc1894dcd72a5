"""The experiment on photographs, much shortened, on noise in their place."""
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from timm_itpn.cli import main
from timm_itpn.studies import photographs, results
from timm_itpn.studies.two_tasks import Training

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def short(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (8, 30, 30), dtype=np.uint8), np.arange(8) / 7, None
    fake = SimpleNamespace(load_dataset=lambda: noise)
    monkeypatch.setitem(sys.modules, 'elpv_dataset', SimpleNamespace(utils=fake))
    monkeypatch.setitem(sys.modules, 'elpv_dataset.utils', fake)
    monkeypatch.setattr(results, 'ProcessPoolExecutor', lambda *_: ThreadPoolExecutor(1))
    update = Training(1, 2, 1e-3)
    for name, value in dict(
            _SIDE=64, _NUM_MASKED=2, _PRETRAINING=update, _TRAININGS={32: update, 64: update}, _TUNING=update,
            _MODEL=dict(photographs._MODEL, embed_dim=64, depths=(1, 1, 2), num_heads=2),
            _DECODER=dict(photographs._DECODER, decoder_dim=32, decoder_depth=1, decoder_num_heads=1)).items():
        monkeypatch.setattr(photographs, name, value)


def test_all_arms_are_measured_with_the_same_scores_again(short):
    rows = list(results.run('photographs', (3,), (), 'cpu'))
    assert [(row.arm, row.measured) for row in rows] == [
        (arm, kind) for arm in photographs.ARMS for kind in ('as it is', 'tuned')]
    assert all(set(row.scores) == {'top-1', 'AP'} and 0 <= row.scores['AP'] <= 100 for row in rows)
    assert [row.scores for row in results.run('photographs', (3, 4), {4}, 'cpu')] == [row.scores for row in rows]


def test_without_its_data_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'elpv_dataset', None)
    assert main(['evidence', 'photographs']) == 1
    assert "needs elpv_dataset: pip install 'timm-itpn[photographs]'" in capsys.readouterr().err

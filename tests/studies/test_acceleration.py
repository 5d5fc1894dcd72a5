"""The experiment on token gathering and migration, much shortened."""
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from timm_itpn.studies import acceleration, results
from timm_itpn.studies.canvases import draw
from timm_itpn.studies.two_tasks import Training

pytestmark = pytest.mark.usefixtures('one_thread')


def test_study_measures_seeds_that_are_not_done(monkeypatch):
    for name in ('_SMALL_TRAINING', '_TRAINING', '_TUNING'):
        monkeypatch.setattr(acceleration, name, Training(1, 2, 1e-3))
    monkeypatch.setattr(acceleration, '_SIDE', 128)
    monkeypatch.setattr(acceleration, '_MODEL', dict(acceleration._MODEL, img_size=128))
    monkeypatch.setattr(acceleration, 'draw', lambda *args, num, **kwargs: draw(*args, num=4, **kwargs))
    monkeypatch.setattr(results, 'ProcessPoolExecutor', lambda *_: ThreadPoolExecutor(1))
    rows = list(results.run('acceleration', (3, 4), {3}, 'cpu'))
    assert [(row.arm, row.measured, row.seed) for row in rows] == [
        (arm, kind, 4) for arm in acceleration.ARMS for kind in ('as it is', 'tuned')]


def test_controls_are_what_they_say(monkeypatch):
    monkeypatch.setattr(acceleration, '_MODEL', dict(acceleration._MODEL, img_size=128))
    x, stages, left = torch.randn(1, 16, 16, 32), {}, {}
    state = acceleration._network('full', 'cpu').state_dict()
    with torch.no_grad():
        for arm in ('full', 'full, stored', *acceleration._CONTROLS):
            stages[arm] = acceleration._network(arm, 'cpu', state).eval().model.stages[2]
            left[arm] = stages[arm].run(x)[1][0].positions
        empty = (stages['full, not replenished'](x) == 0).all(dim=3).flatten()
    assert not stages['full, stored'].carry and stages['full'].carry
    assert torch.equal(left['full, not replenished'], left['full'])
    assert not torch.equal(left['full, random tokens leave'], left['full'])
    assert empty[left['full'].flatten()].all() and not empty.all()

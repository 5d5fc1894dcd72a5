"""The experiment on token gathering and migration, much shortened."""
import pytest
import torch

from timm_itpn.studies import acceleration
from timm_itpn.studies.canvases import draw
from timm_itpn.studies.two_tasks import Training

pytestmark = pytest.mark.usefixtures('one_thread')


def test_study_measures_what_is_not_done(monkeypatch):
    for name in ('_SMALL_TRAINING', '_TRAINING', '_TUNING'):
        monkeypatch.setattr(acceleration, name, Training(1, 2, 1e-3))
    monkeypatch.setattr(acceleration, '_TIMED', dict(acceleration._MODEL, img_size=64, window=2))
    monkeypatch.setattr(acceleration, 'draw', lambda *args, num, **kwargs: draw(*args, num=4, **kwargs))
    rows = list(acceleration.study((3, 4)))
    expected = [(arm, kind, 3) for kind in ('as it is', 'tuned') for arm in acceleration.ARMS]
    expected += [(arm, kind, 4) for kind in ('as it is', 'tuned') for arm in acceleration._SETTINGS]
    assert [row.key for row in rows] == expected + [(arm, '1024 px', 3) for arm in acceleration.ARMS]
    speeds = [row.scores['speed'] for row in rows if row.measured == '1024 px']
    assert speeds[0] == 1. and min(speeds) > 0
    done = [row.key for row in rows if row.arm != 'full']
    assert [row.key for row in acceleration.study((3, 4), done)] == [row.key for row in rows if row.arm == 'full']


def test_controls_are_what_they_say():
    x, state = torch.randn(1, 16, 16, 32), None
    stages, left = {}, {}
    for arm in ('full', 'full, stored', 'full, random tokens leave', 'full, not replenished'):
        model = acceleration._SETTINGS[arm].create(**{**acceleration._MODEL, 'img_size': 128, 'window': 4}).eval()
        state = state or model.state_dict()
        model.load_state_dict(state)
        stages[arm] = model.stages[2]
        with torch.no_grad():
            left[arm] = stages[arm].run(x)[1][0].positions
    assert not stages['full, stored'].carry and stages['full'].carry
    assert torch.equal(left['full, not replenished'], left['full'])
    assert not torch.equal(left['full, random tokens leave'], left['full'])
    with torch.no_grad():
        empty = (stages['full, not replenished'](x) == 0).all(dim=3).flatten()
    assert empty[left['full'].flatten()].all() and not empty.all()

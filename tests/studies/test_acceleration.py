"""The experiment on token gathering and migration, much shortened."""
import pytest

from timm_itpn.studies import acceleration
from timm_itpn.studies.canvases import draw
from timm_itpn.studies.two_tasks import Training

pytestmark = pytest.mark.usefixtures('one_thread')


def test_study_measures_the_arms_and_tunes_the_settings(monkeypatch):
    for name in ('_SMALL_TRAINING', '_TRAINING', '_TUNING'):
        monkeypatch.setattr(acceleration, name, Training(1, 2, 1e-3))
    swept = ['windows of 4 in the first 2 blocks', '50% stay (windows of 4)']
    monkeypatch.setattr(acceleration, '_SWEEP', {arm: acceleration._SWEEP[arm] for arm in swept})
    monkeypatch.setattr(acceleration, 'draw', lambda *args, num, **kwargs: draw(*args, num=4, **kwargs))
    measured = [(row.arm, row.measured, row.seed) for row in acceleration.study((0, 3))]
    settings = ('off', 'light', 'full')
    forms = (*settings, 'windows in all blocks')
    expected = [(arm, 'as it is', 0) for arm in (*forms, *swept)] + [(arm, 'tuned', 0) for arm in forms]
    assert measured == expected + [(arm, kind, 3) for kind in ('as it is', 'tuned') for arm in settings]

"""The experiment on token gathering and migration, much shortened."""
import pytest
import torch

from timm_itpn.studies import acceleration
from timm_itpn.studies.acceleration import FORMS, SETTINGS, SWEEP, Setting, create, leave_empty, study
from timm_itpn.studies.canvases import draw

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def short(monkeypatch):
    for name in ('SMALL_UPDATES', 'UPDATES', 'TUNING_UPDATES'):
        monkeypatch.setattr(acceleration, name, 1)
    monkeypatch.setattr(acceleration, 'BATCH', 2)
    monkeypatch.setattr(acceleration, 'draw', lambda *args, num, **kwargs: draw(*args, num=6, **kwargs))


def test_study_measures_all_settings_before_and_after_tuning(short):
    rows = list(study((0, 3)))
    asked = [(row['setting'], row['tuned'], row['seed']) for row in rows]
    every, forms, sweep = ([setting.name for setting in group] for group in (SETTINGS, FORMS, SWEEP))
    wanted = [(name, False, 0) for name in every + forms + sweep] + [(name, True, 0) for name in every + forms]
    wanted += [(name, tuned, 3) for tuned in (False, True) for name in every]
    assert asked == wanted and len(set(asked)) == len(asked)
    for row in rows:
        assert 0 <= row['top1'] <= 100 and 0 <= row['miou'] <= 100


def test_controls_do_what_they_say():
    x = torch.randn(2, 3, acceleration.SIDE, acceleration.SIDE)
    kwargs = dict(gather_window=8, migrate={0: 0.25})
    stages = {}
    for name, change in (('as it is', lambda model: None), ('empty', leave_empty)):
        torch.manual_seed(0)
        stages[name] = create(Setting(name, kwargs, change)).eval().model
    with torch.no_grad():
        maps = stages['empty'].stages[:2](stages['empty'].patch_embed(x))
        (full, places), (holes, _) = (model.stages[2].run(maps) for model in stages.values())
    gone = torch.zeros(2, 256, dtype=torch.bool).scatter(1, places[0].flatten(1), True).reshape(2, 16, 16)
    assert (holes[gone] == 0).all() and (full[gone] != 0).any(dim=1).all()
    assert torch.equal(holes[~gone], full[~gone]) and gone.sum() == 2 * 64

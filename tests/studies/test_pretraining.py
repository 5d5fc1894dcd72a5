"""The experiment on pre-training, much shortened."""
import pytest
import torch

from timm_itpn.studies import pretraining
from timm_itpn.studies.canvases import draw
from timm_itpn.studies.pretraining import CANVAS, LABELS, STARTS, build, markdown_table, pretrain, study

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def short(monkeypatch):
    for name in ('UPDATES', 'TUNING_UPDATES'):
        monkeypatch.setattr(pretraining, name, 1)
    for name in ('BATCH', 'TUNING_BATCH'):
        monkeypatch.setattr(pretraining, name, 2)
    monkeypatch.setattr(pretraining, 'draw', lambda *args, num, **kwargs: draw(*args, num=6, **kwargs))
    monkeypatch.setattr(pretraining, 'in_processes', lambda function, items, **kwargs: map(function, items))


def test_study_measures_all_starts(short):
    rows = list(study((0, 3)))
    asked = [(row['seed'], row['start'], row['labels']) for row in rows]
    assert asked == [(seed, start.name, num) for seed in (0, 3) for start in STARTS for num in LABELS]
    for row in rows:
        assert 0 <= row['top1'] <= 100 and 0 <= row['miou'] <= 100


@pytest.mark.parametrize('start', STARTS, ids=lambda start: start.name)
def test_network_has_the_weights_that_its_start_says(short, start):
    canvases = draw(*pretraining.load_digits(test=True), num=4, seed=0, **CANVAS)
    state = pretrain(start, canvases, seed=0) if start.objective else {}
    network = build(start, state, seed=1).model.state_dict()
    new = build(STARTS[0], {}, seed=1).model.state_dict()
    for key, value in network.items():
        trained = bool(start.objective) and not key.startswith('head.')
        trained = trained and not (start.new_pyramid and key.startswith('pyramid.'))
        assert torch.equal(value, state[key] if trained else new[key]), key


def test_labelled_canvases_are_of_few_digits(monkeypatch):
    monkeypatch.setattr(pretraining, 'draw', lambda digits, labels, **kwargs: labels)
    labels = torch.arange(10).repeat(9)
    assert pretraining.labelled(torch.zeros(90, 8, 8), labels, 3).bincount().tolist() == [3] * 10


def test_table_has_means_over_seeds():
    rows = [
        {'start': start, 'labels': labels, 'seed': seed, 'top1': top1 + seed, 'miou': top1 / 2}
        for seed in (0, 1) for start, labels, top1 in (('scratch', 10, 30.), ('scratch', 50, 80.), ('mfm', 10, 50.))]
    assert markdown_table(rows) == """\
| start | top-1, 10 labels | mIoU, 10 labels | top-1, 50 labels | mIoU, 50 labels | seeds |
| --- | --- | --- | --- | --- | --- |
| scratch | 30.50 | 15.00 | 80.50 | 40.00 | 2 |
| mfm | 50.50 | 25.00 |  |  | 2 |"""

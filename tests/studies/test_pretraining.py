"""The experiment on pre-training, much shortened."""
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from timm_itpn.bench.rows import read
from timm_itpn.cli import main
from timm_itpn.studies import pretraining, results
from timm_itpn.studies.canvases import draw, load_digits
from timm_itpn.studies.two_tasks import Training

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def short(monkeypatch):
    for name in ('_PRETRAINING', '_TUNING'):
        monkeypatch.setattr(pretraining, name, Training(1, 2, 1e-3))
    monkeypatch.setattr(pretraining, 'draw', lambda *args, num, **kwargs: draw(*args, num=4, **kwargs))
    monkeypatch.setattr(results, 'ProcessPoolExecutor', lambda *_: ThreadPoolExecutor(1))


def test_command_measures_all_starts_once_and_writes_rows(short, tmp_path, capsys, monkeypatch):
    path = tmp_path / 'rows.jsonl'
    assert main(['evidence', 'pretraining', '--seeds', '3', '--record', str(path)]) == 0
    rows = read(path, results.Row)
    expected = [(3, arm, f'{num} labels') for arm in pretraining.ARMS for num in (10, 50)]
    assert [(row.seed, row.arm, row.measured) for row in rows] == expected
    table = capsys.readouterr().out
    assert table == f'{results.markdown("pretraining", rows)}\n'
    monkeypatch.setattr(pretraining, 'study_seed', None)  # what is done is not done again
    assert main(['evidence', 'pretraining', '--seeds', '3', '--record', str(path)]) == 0
    assert capsys.readouterr().out == table


@pytest.mark.parametrize('arm', pretraining.ARMS)
def test_network_has_the_weights_that_its_start_says(short, arm):
    start = pretraining.STARTS[arm]
    canvases = draw(*load_digits(test=True), num=4, seed=0, **pretraining._CANVAS)
    untrained = pretraining._network(start, {}, seed=0).model.state_dict()
    state = {}
    if start.objective:
        state = pretraining.pretrain(start.objective, canvases, pretraining._PRETRAINING, 0, 'cpu')
    network = pretraining._network(start, state, seed=1).model.state_dict()
    new = pretraining._network(start, {}, seed=1).model.state_dict()
    for key, value in network.items():
        kept = start.objective and not key.startswith('head.')
        kept = kept and not (start.new_pyramid and key.startswith('pyramid.'))
        assert torch.equal(value, state[key] if kept else new[key]), key
    trained = [key for key, value in state.items() if not torch.equal(value, untrained[key])]
    assert bool(trained) == bool(start.objective)


def test_pyramid_of_the_comparison_is_not_trained():
    student = pretraining.create_student('fast_itpn_tiny', 'pixel', pretraining._SIDE, **pretraining._MODEL)
    objective = pretraining.PixelOfStage3(student, 8, **pretraining._DECODER)
    masked = torch.arange(16).reshape(1, 4, 4) % 2 == 0
    objective(torch.randn(1, 3, 64, 64), masked)['loss'].backward()
    assert all(p.grad is None for p in student.pyramid.parameters())
    assert all(p.grad is not None for p in student.stages[2].blocks.parameters())

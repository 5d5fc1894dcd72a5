"""The log of a run for TensorBoard."""
import importlib.util

import pytest
from support.pretrain_runs import log_lines, run, write_images

pytestmark = pytest.mark.usefixtures('one_thread')


def test_tensorboard_shows_the_lines_of_the_log(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = write_images(tmp_path / 'data')
    run(data, tmp_path / 'run', '--epochs', '2', '--log-tensorboard')
    run(data, tmp_path / 'run', '--epochs', '2', '--log-tensorboard', '--resume', 'auto')  # nothing is left to do
    events = EventAccumulator(str(tmp_path / 'run' / 'tensorboard')).Reload()
    lines = log_lines(tmp_path / 'run')
    assert len(lines) == 4
    for name in ('loss', 'lr', 'images_per_s'):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(line['num_updates'], pytest.approx(line[name], rel=1e-6)) for line in lines]


def test_missing_tensorboard_is_told_before_anything_is_written(tmp_path, monkeypatch):
    data = write_images(tmp_path / 'data')
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'tensorboard' else find(name))
    with pytest.raises(RuntimeError, match='^--log-tensorboard needs tensorboard: pip install'):
        run(data, tmp_path / 'run', '--log-tensorboard')
    assert not (tmp_path / 'run').exists()

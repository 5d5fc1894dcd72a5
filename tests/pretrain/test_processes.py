"""Runs of several processes, and processes that are killed."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.pretrain_runs import MFM, assert_same, command, log_lines, run, weights, write_images

PATIENCE_S = 240


def start(data, output, *more, **kwargs):
    """Start a run in two processes."""
    return subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', '--no-python',
         str(Path(sys.executable).with_name('timm-itpn')), 'pretrain', *command(data, output, *more, **kwargs)],
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    return json.loads(output.splitlines()[-1])


def kill_after(process, output, lines):
    """Kill all processes of a run without warning, once its log has so many lines."""
    log = output / 'log.jsonl'
    deadline = time.monotonic() + PATIENCE_S
    while not log.exists() or log.read_text().count('\n') < lines:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def losses(output):
    return [line['loss'] for line in log_lines(output)]


def assert_close(output, other):
    """The same losses and weights, to float error."""
    assert losses(output) == pytest.approx(losses(other), rel=1e-5)
    ours, theirs = weights(output), weights(other)
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('data'), num=16)


def test_two_processes_learn_as_one(data, tmp_path, one_thread):
    """Half of each batch in each process: the same images and masks."""
    more = ('--drop-path', '0', '--model-ema', '--model-ema-decay', '0.5')
    both = start(data, tmp_path / 'two', *more, '--batch-size', '2')
    run(data, tmp_path / 'one', *more, '--batch-size', '4')
    finish(both)
    assert_close(tmp_path / 'two', tmp_path / 'one')


def test_killed_processes_resume_to_the_same_weights(data, tmp_path):
    """Copies of the parameters (DDP) and shares of them (FSDP2), killed and resumed, and a run that was left alone."""
    more = ('--batch-size', '2', '--grad-accum-steps', '2', '--recovery-interval', '3', '--drop-path', '0.3',
            '--model-ema', '--model-ema-decay', '0.5')
    runs = {'whole': (), 'copies': ('--resume', 'auto'), 'shares': ('--resume', 'auto', '--fsdp')}
    for name, options in runs.items():
        output = tmp_path / name
        if name != 'whole':
            kill_after(start(data, output, *more, *options, objective=MFM), output, lines=4)
        assert finish(start(data, output, *more, *options, objective=MFM))['num_updates'] == 8
        assert not [path.name for path in output.iterdir() if path.name.startswith('.')]
    assert_same(weights(tmp_path / 'copies'), weights(tmp_path / 'whole'))
    assert losses(tmp_path / 'copies') == losses(tmp_path / 'whole')
    assert_close(tmp_path / 'shares', tmp_path / 'whole')

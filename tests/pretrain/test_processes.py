"""Runs of several processes, and processes that are killed."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from support.pretrain_runs import MFM, assert_same, command, log_lines, weights, write_images

PATIENCE_S = 240


def start(data, output, *more, processes, **kwargs):
    """Start a run in processes of its own."""
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}'] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *torchrun, '-m', 'timm_itpn.pretrain', *command(data, output, *more, **kwargs)],
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    return json.loads(output.splitlines()[-1])


def num_lines(output):
    path = output / 'log.jsonl'
    return path.read_text().count('\n') if path.exists() else 0


def kill_at(process, output, lines):
    """Kill all processes of a run without warning, once its log has so many lines."""
    deadline = time.monotonic() + PATIENCE_S
    while num_lines(output) < lines:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def losses(output):
    return [line['loss'] for line in log_lines(output)]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('data'), num=16)


def test_two_processes_learn_as_one(data, tmp_path):
    """Half of each batch in each process: the same images and masks, so the same losses and weights to float error."""
    more = ('--drop-path', '0', '--model-ema', '--model-ema-decay', '0.5')
    both = start(data, tmp_path / 'two', *more, '--batch-size', '2', processes=2)
    finish(start(data, tmp_path / 'one', *more, '--batch-size', '4', processes=1))
    finish(both)
    torch.testing.assert_close(torch.tensor(losses(tmp_path / 'two')), torch.tensor(losses(tmp_path / 'one')))
    one, two = weights(tmp_path / 'one'), weights(tmp_path / 'two')
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-4)


def test_killed_processes_resume_to_the_same_weights(data, tmp_path):
    """Two processes, killed three times: whatever they were doing, the end is that of a run that was left alone."""
    more = ('--batch-size', '2', '--recovery-interval', '3', '--drop-path', '0.3')
    whole = start(data, tmp_path / 'whole', *more, processes=2)
    for lines in (2, 7, 13):
        kill_at(start(data, tmp_path / 'killed', *more, '--resume', 'auto', processes=2), tmp_path / 'killed', lines)
    finish(start(data, tmp_path / 'killed', *more, '--resume', 'auto', processes=2))
    assert finish(whole)['num_updates'] == 16
    assert_same(weights(tmp_path / 'killed'), weights(tmp_path / 'whole'))
    assert losses(tmp_path / 'killed') == losses(tmp_path / 'whole')
    left = [path.name for path in (tmp_path / 'killed').iterdir() if path.name.startswith('.')]
    assert not left


def test_shared_parameters_learn_as_copies(data, tmp_path):
    """FSDP2 against DDP, with averages, accumulation and a killed process."""
    more = ('--batch-size', '2', '--grad-accum-steps', '2', '--model-ema', '--model-ema-decay', '0.5')
    copies = start(data, tmp_path / 'copies', *more, objective=MFM, processes=2)
    kill_at(start(data, tmp_path / 'shares', *more, '--fsdp', '--resume', 'auto', objective=MFM, processes=2),
            tmp_path / 'shares', 5)
    finish(start(data, tmp_path / 'shares', *more, '--fsdp', '--resume', 'auto', objective=MFM, processes=2))
    finish(copies)
    torch.testing.assert_close(torch.tensor(losses(tmp_path / 'shares')), torch.tensor(losses(tmp_path / 'copies')))
    ours, theirs = weights(tmp_path / 'shares'), weights(tmp_path / 'copies')
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-4)

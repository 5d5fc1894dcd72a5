"""Runs of several processes, and processes that are killed."""
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.pretrain_runs import MFM, assert_same, command, log_lines, run, weights, write_images

PATIENCE_S = 240
COMMAND = str(Path(sys.executable).with_name('timm-itpn'))
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '--no-python']


def start(args, **environment):
    return subprocess.Popen(
        args, env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_ranks(args):
    """Start two processes as torchrun does, but so that they can be killed."""
    with socket.create_server(('localhost', 0)) as server:
        port = server.getsockname()[1]
    return [
        start([COMMAND, *args], RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='localhost',
              MASTER_PORT=str(port))
        for rank in range(2)]


def finish(process):
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    return output


def kill_after(ranks, output, lines):
    """Kill the processes of a run without warning, once its log has so many lines."""
    log = output / 'log.jsonl'
    deadline = time.monotonic() + PATIENCE_S
    while not log.exists() or log.read_text().count('\n') < lines:
        assert ranks[0].poll() is None and time.monotonic() < deadline, ranks[0].communicate()[0]
        time.sleep(0.01)
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.communicate()


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


def test_two_processes_of_torchrun_learn_as_one(data, tmp_path, one_thread):
    """Half of each batch in each process: the same images and masks."""
    more = ('--drop-path', '0', '--model-ema', '--model-ema-decay', '0.5')
    both = start([*TORCHRUN, COMMAND, 'pretrain', *command(data, tmp_path / 'two', *more, '--batch-size', '2')])
    run(data, tmp_path / 'one', *more, '--batch-size', '4')
    result = json.loads(finish(both).splitlines()[-1])
    assert result['num_updates'] == 16
    assert_close(tmp_path / 'two', tmp_path / 'one')


def test_killed_processes_resume_to_the_same_weights(data, tmp_path):
    """Copies of the parameters (DDP) and shares of them (FSDP2), killed and resumed, and a run that was left alone."""
    more = ('--batch-size', '2', '--grad-accum-steps', '2', '--recovery-interval', '3', '--drop-path', '0.3',
            '--model-ema', '--model-ema-decay', '0.5')
    for name, options in (('whole', ()), ('copies', ('--resume', 'auto')), ('shares', ('--resume', 'auto', '--fsdp'))):
        output = tmp_path / name
        args = ['pretrain', *command(data, output, *more, *options, objective=MFM)]
        if name != 'whole':
            kill_after(start_ranks(args), output, lines=4)
        for rank in start_ranks(args):
            finish(rank)
        assert not [path.name for path in output.iterdir() if path.name.startswith('.')]
    assert_same(weights(tmp_path / 'copies'), weights(tmp_path / 'whole'))
    assert losses(tmp_path / 'copies') == losses(tmp_path / 'whole')
    assert_close(tmp_path / 'shares', tmp_path / 'whole')

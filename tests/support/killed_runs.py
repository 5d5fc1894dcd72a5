"""Runs that are killed, again and again. By hand, at random moments: python -m support.killed_runs KILLS, in tests/."""
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch

from support.pretrain_runs import assert_same, command, log_lines, parse, weights, write_images
from support.processes import FORKS, INTERPRETERS
from timm_itpn import files
from timm_itpn.pretrain.task import pretrain

PATIENCE_S = 240


def pretrain_run(argv):
    pretrain(parse(argv))


def start(args, strike=None, train=pretrain_run, context=FORKS, **environment):
    """Start a run in a process of its own.

    Args:
        args: Of the command.
        strike: Name of a file and 'write' or 'rename': the process kills itself in the middle of writing the file, or
            right before it gets its name. None: it does not.
        train: What runs a command line.
        context: What makes the process.
        environment: Of the process.
    """
    process = context.Process(target=_run, args=(args, strike, train, environment))
    process.start()
    return process


def start_ranks(args, train=pretrain_run):
    """Start two processes as torchrun does, but so that they can be killed."""
    with socket.create_server(('localhost', 0)) as server:
        where = dict(MASTER_ADDR='localhost', MASTER_PORT=str(server.getsockname()[1]), WORLD_SIZE='2')
    return [start(args, None, train, INTERPRETERS, RANK=str(rank), LOCAL_RANK=str(rank), **where) for rank in range(2)]


def finish(*processes):
    for process in processes:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def kill(*processes):
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _run(args, strike, train, environment):
    os.environ.update(environment)
    multiprocessing.set_start_method('fork', force=True)  # of workers: else orphans of this process stay
    torch.set_num_threads(1)
    if strike is not None:
        _arrange(*strike)
    train(args)


def _arrange(name, moment):
    """Let this process kill itself at a moment of writing a file."""
    flush, replace = files._flush, os.replace

    def die_of(path):
        if Path(path).name == name:
            os.kill(os.getpid(), signal.SIGKILL)

    def flush_half(path):
        if path.name == name:
            os.truncate(path, path.stat().st_size // 2)
        die_of(path)
        flush(path)

    def replace_not(source, target):
        die_of(target)
        replace(source, target)

    if moment == 'write':
        files._flush = flush_half
    else:
        os.replace = replace_not


def main(num_kills):
    """Kill runs so often, half of the times while they write a file, and compare them with one that was left alone."""
    folder = Path(tempfile.mkdtemp(prefix='killed_runs_'))
    data = write_images(folder / 'data', num=16)
    more = ('--epochs', '5', '--recovery-interval', '1', '--drop-path', '0.3', '--model-ema', '--resume', 'auto')
    began = time.monotonic()
    finish(start(command(data, folder / 'whole', *more)))
    duration = time.monotonic() - began
    names = [f'checkpoint-{number:08d}.pt' for number in range(1, 21)] + 3 * ['summary.csv', 'pretrained.safetensors']
    kills = {'any moment': 0, 'write': 0, 'rename': 0}
    runs = 0
    while sum(kills.values()) < num_kills:
        runs += 1
        output = folder / f'killed-{runs}'
        args = command(data, output, *more, '--workers', str(runs % 2))
        while True:
            strike = random.choice((None, (random.choice(names), random.choice(('write', 'rename')))))
            process = start(args, strike)
            process.join(random.uniform(0.2, 0.8) * duration)
            if process.exitcode == 0:
                break
            kills[strike[1] if process.exitcode == -9 else 'any moment'] += 1
            kill(process)
        assert_same(weights(output), weights(folder / 'whole'))
        assert [line['loss'] for line in log_lines(output)] == [line['loss'] for line in log_lines(folder / 'whole')]
        assert (output / 'summary.csv').read_text() == (folder / 'whole' / 'summary.csv').read_text()
    print(f'{sum(kills.values())} kills of {runs} runs {kills}: equal to the bit')


if __name__ == '__main__':
    main(int(sys.argv[1]))

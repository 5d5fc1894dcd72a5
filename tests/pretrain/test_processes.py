"""Runs of several processes, and processes that are killed."""
import time

import pytest
import torch
from support.killed_runs import PATIENCE_S, finish, kill, start, start_ranks
from support.pretrain_runs import MFM, assert_same, command, log_lines, run, weights, write_images


def kill_after(ranks, output, lines):
    """Kill the processes of a run without warning, once its log has so many lines."""
    log = output / 'log.jsonl'
    deadline = time.monotonic() + PATIENCE_S
    while not log.exists() or log.read_text().count('\n') < lines:
        assert ranks[0].is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    kill(*ranks)


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
    """Half of each batch, and of the parameters, in each process: the same images and masks."""
    more = ('--drop-path', '0', '--model-ema', '--model-ema-decay', '0.5', '--epochs', '2')
    both = start_ranks(command(data, tmp_path / 'two', *more, '--batch-size', '2', '--fsdp'))
    run(data, tmp_path / 'one', *more, '--batch-size', '4')
    finish(*both)
    assert len(losses(tmp_path / 'two')) == 8
    assert_close(tmp_path / 'two', tmp_path / 'one')


@pytest.mark.slow
def test_killed_processes_resume_to_the_same_weights(data, tmp_path):
    """Copies of the parameters (DDP) and shares of them (FSDP2), killed and resumed, and a run that was left alone."""
    more = ('--batch-size', '2', '--grad-accum-steps', '2', '--recovery-interval', '1', '--drop-path', '0.3',
            '--model-ema', '--model-ema-decay', '0.5', '--epochs', '2')
    for name, options in (('whole', ()), ('copies', ('--resume', 'auto')), ('shares', ('--resume', 'auto', '--fsdp'))):
        output = tmp_path / name
        args = command(data, output, *more, *options, objective=MFM)
        if name != 'whole':
            kill_after(start_ranks(args), output, lines=3)
        finish(*start_ranks(args))
    assert_same(weights(tmp_path / 'copies'), weights(tmp_path / 'whole'))
    assert losses(tmp_path / 'copies') == losses(tmp_path / 'whole')
    assert_close(tmp_path / 'shares', tmp_path / 'whole')


def test_run_that_is_killed_while_it_writes_ends_with_the_same_weights(data, tmp_path, one_thread):
    """In a checkpoint, before that has its name, before the table is trimmed, and between the files of the weights."""
    more = ('--epochs', '2', '--recovery-interval', '1', '--drop-path', '0.3')
    args = command(data, tmp_path / 'killed', *more, '--resume', 'auto')
    for strike in (('checkpoint-00000003.pt', 'write'), ('checkpoint-00000004.pt', 'rename'), ('summary.csv', 'rename'),
                   ('pretrained.pth', 'write')):
        process = start(args, strike)
        process.join(PATIENCE_S)
        assert process.exitcode == -9
    finish(start(args))
    run(data, tmp_path / 'whole', *more)
    assert_same(weights(tmp_path / 'killed'), weights(tmp_path / 'whole'))
    assert losses(tmp_path / 'killed') == losses(tmp_path / 'whole')
    for name in ('summary.csv', 'args.json'):
        assert (tmp_path / 'killed' / name).read_text() == (tmp_path / 'whole' / name).read_text()
    assert [path.name for path in (tmp_path / 'killed').glob('.*')] in ([], ['.lock'])

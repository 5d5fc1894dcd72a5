"""The loop of pre-training: epochs, with checkpoints and a log, and the weights at the end."""
import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import AverageMeter, init_distributed_device, random_seed

from ..checks import require
from .arguments import settings_of
from .checkpoints import Checkpoints, load
from .data import Batches, SampleMaker, open_dataset
from .export import export
from .figures import draw
from .log import Log
from .masking import MASKINGS
from .run import Batch, Run
from .task import create_task

__all__ = ['pretrain']


def pretrain(args: argparse.Namespace) -> dict[str, Any]:
    """Start a run, or go on with one.

    Args:
        args: Arguments of the command, see `arguments.add_arguments`.

    Returns:
        What was written, for JSON.

    Raises:
        RuntimeError: The loss is not finite, a package or the device is missing, a checkpoint cannot be read or
            written, or weights cannot be had.
        ValueError: An argument is not usable, or not that of the run that is to be resumed.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        return _pretrain(args)
    finally:
        torch.use_deterministic_algorithms(deterministic)
        if dist.is_initialized():
            dist.destroy_process_group()


def _pretrain(args: argparse.Namespace) -> dict[str, Any]:
    if args.log_tensorboard:
        require('--log-tensorboard', 'tensorboard', 'tensorboard')
    if torch.device(args.device).type == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f'--device is {args.device}, but there is no CUDA device: use --device cpu.')
    checkpoints = Checkpoints(args.output, args.checkpoint_hist)
    path = _resumed(args, checkpoints)
    run = create_run(args)
    if path is not None:
        run.load_state_dict(load(path), path)
    if args.rank == 0:
        args.output.mkdir(parents=True, exist_ok=True)
        checkpoints.sweep()
        (args.output / 'args.json').write_text(json.dumps(run.settings, indent=2) + '\n', encoding='utf-8')
    log = Log(run)
    while run.epoch < args.epochs:
        last = run_epoch(run, checkpoints, log)
        if args.figure_interval and run.epoch % args.figure_interval == 0 and args.rank == 0:
            draw(args.output / f'epoch-{run.epoch:04d}.png', run.task, last)
        _save(run, checkpoints)
    log.close()
    return export(run)


def create_run(args: argparse.Namespace) -> Run:
    """Create a run; `args` gets the device, rank and number of processes."""
    settings = settings_of(args)
    device = init_distributed_device(args)
    settings['world_size'] = args.world_size
    random_seed(args.seed, 0)  # the same weights in all processes
    if args.deterministic:
        torch.use_deterministic_algorithms(True)
    task = create_task(args, device)
    objective = task.objective
    make = SampleMaker(
        tuple(task.views), objective.grid_size, MASKINGS[args.masking or objective.MASKING], objective.num_masked,
        args.seed, tuple(args.scale), tuple(args.ratio), args.hflip, args.train_interpolation)
    dataset = open_dataset(
        args.dataset, args.data_dir, args.train_split, batch_size=args.batch_size, seed=args.seed,
        num_samples=args.train_num_samples)
    batches = Batches(
        dataset, make, args.batch_size, args.workers, args.rank, args.world_size, pin_memory=device.type == 'cuda')
    run = Run(args, settings, task, batches)
    random_seed(args.seed, args.rank)
    return run


def run_epoch(run: Run, checkpoints: Checkpoints, log: Log) -> Batch:
    """The rest of an epoch, with checkpoints and log; gives its last batch."""
    args = run.args
    images = args.batch_size * args.grad_accum_steps * args.world_size
    meters: dict[str, AverageMeter] = defaultdict(AverageMeter)
    start = asked = time.perf_counter()
    waited = 0.
    run.task.train()
    for batch in run.rest_of_epoch():
        waited += time.perf_counter() - asked
        losses = run.step(batch)
        if losses is not None:
            for name, value in losses.items():
                meters[name].update(value)
            rate = images / (time.perf_counter() - start)
            start = time.perf_counter()
            log.update(images_per_s=f'{rate:.1f}', epoch=run.epoch, loss=f'{losses["loss"]:.4f}')
            if run.num_updates % args.log_interval == 0:
                log.line({
                    'epoch': run.epoch, 'lr': run.lr, **_mean_of_processes(losses, args), 'images_per_s': rate,
                    'waited_s': waited, 'skipped': run.skipped})
            if run.is_recovery_point():
                _save(run, checkpoints)
        asked = time.perf_counter()
    log.epoch(_mean_of_processes({name: meter.avg for name, meter in meters.items()}, args))
    run.epoch, run.batch = run.epoch + 1, 0
    return batch


def _mean_of_processes(values: dict[str, float], args: argparse.Namespace) -> dict[str, float]:
    if not args.distributed:
        return values
    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=args.device)
    dist.all_reduce(tensor)
    return dict(zip(values, (tensor / args.world_size).tolist()))


def _save(run: Run, checkpoints: Checkpoints) -> None:
    state = run.state_dict()
    if run.args.rank == 0:
        checkpoints.save(state, run.num_updates)
    if run.args.distributed:
        dist.barrier()


def _resumed(args: argparse.Namespace, checkpoints: Checkpoints) -> Path | None:
    """The checkpoint to go on from, None to start.

    Raises:
        ValueError: There is a run in the folder, and --resume was not given.
    """
    if args.resume not in (None, 'auto'):
        return Path(args.resume)
    last = checkpoints.last()
    if last is not None and args.resume is None:
        raise ValueError(f'{args.output} holds a run: go on with --resume auto, or name another folder with --output.')
    if last is None and args.resume == 'auto':
        print(f'no checkpoint in {args.output}: starting', file=sys.stderr)
    return last

"""The loop of pre-training: epochs, with checkpoints and a log, and the weights at the end."""
import argparse
import json
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from timm.utils import init_distributed_device, random_seed, reduce_tensor

from ..checks import require
from ..files import FULL
from .arguments import FREE
from .checkpoints import Checkpoints
from .data import Batches, SampleMaker, fingerprint, open_dataset
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
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise RuntimeError(f'{error.filename or args.output}: {error.strerror}. Free space there, then go on with '
                           '--resume auto.') from error
    finally:
        torch.use_deterministic_algorithms(deterministic)
        if dist.is_initialized():
            dist.destroy_process_group()


def _pretrain(args: argparse.Namespace) -> dict[str, Any]:
    if args.log_tensorboard:
        require('--log-tensorboard', 'tensorboard', 'tensorboard')
    _complete(args)
    checkpoints = Checkpoints(args.output, args.checkpoint_hist or 2)
    checkpoints.to_resume(args.resume)
    found = None if args.resume in (None, 'auto') else checkpoints.newest(args.resume)
    run = create_run(args)
    with checkpoints.locked() if args.rank == 0 else nullcontext():
        if (found := found or checkpoints.newest(args.resume)) is not None:
            run.load_state_dict(found[1], found[0])
        elif args.resume and args.rank == 0:
            print(f'no checkpoint in {args.output}: starting', file=sys.stderr)
        if args.rank == 0:
            if found is not None:
                checkpoints.set_aside(found[0])
            (args.output / 'args.json').write_text(json.dumps(run.settings, indent=2) + '\n', encoding='utf-8')
        log = Log(run)
        while run.epoch < args.epochs:
            last = run_epoch(run, checkpoints, log)
            if args.figure_interval and run.epoch % args.figure_interval == 0 and args.rank == 0:
                draw(args.output / f'epoch-{run.epoch:04d}.png', run.task, last)
            _save(run, checkpoints)
        log.close()
        result = export(run)
        if result and args.checkpoint_hist is None:
            checkpoints.prune(1)
        return result


def _complete(args: argparse.Namespace) -> None:
    """Choose what --help says follows from the machine or from other arguments.

    Raises:
        ValueError: There is no such device, or the warm-up would never end.
    """
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if torch.device(args.device).type == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f'--device is {args.device}, but there is no CUDA device: use --device cpu.')
    args.objective = args.objective or ('clip' if args.teacher else 'pixel')
    if args.warmup_epochs is None:
        args.warmup_epochs = min(10, args.epochs // 10)
    if args.warmup_epochs >= args.epochs:
        raise ValueError(f'--epochs {args.epochs} end within the warm-up: --warmup-epochs {args.warmup_epochs} must be '
                         'fewer.')


def create_run(args: argparse.Namespace) -> Run:
    """Create a run; `args` gets the device, rank and number of processes."""
    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    device = init_distributed_device(args)
    settings['world_size'] = args.world_size
    dataset = open_dataset(
        args.dataset, args.data_dir, args.train_split, batch_size=args.batch_size, seed=args.seed,
        num_samples=args.train_num_samples)
    settings['data'] = fingerprint(dataset)
    random_seed(args.seed, 0)  # the same weights in all processes
    if args.deterministic:
        torch.use_deterministic_algorithms(True)
    task = create_task(args, device)
    objective = task.objective
    make = SampleMaker(
        tuple(task.views), objective.grid_size, MASKINGS[args.masking or objective.MASKING], objective.num_masked,
        args.seed, tuple(args.scale), tuple(args.ratio), args.hflip, args.train_interpolation)
    try:
        make(Image.new('RGB', (2, 2)), '', 0)
    except Exception as error:  # of torchvision, for sizes that cannot be drawn
        raise ValueError(f'--scale, --ratio or --train-interpolation cannot be used: {error}') from error
    batches = Batches(
        dataset, make, args.batch_size, args.workers, args.rank, args.world_size, pin_memory=device.type == 'cuda')
    run = Run(args, settings, task, batches)
    random_seed(args.seed, args.rank)
    return run


def run_epoch(run: Run, checkpoints: Checkpoints, log: Log) -> Batch:
    """The rest of an epoch, with checkpoints and log; gives its last batch."""
    args = run.args
    start = asked = time.perf_counter()
    waited = 0.
    run.task.train()
    for batch in run.rest_of_epoch():
        waited += time.perf_counter() - asked
        losses = run.step(batch)
        if losses is not None:
            rate = run.images_per_update / (time.perf_counter() - start)
            start = time.perf_counter()
            log.update(images_per_s=f'{rate:.1f}', epoch=run.epoch, loss=f'{losses["loss"]:.4f}')
            if run.num_updates % args.log_interval == 0 or run.ends_epoch:
                skipped = run.skipped * args.world_size  # whose mean is the sum of all processes
                means = _mean_of_processes({**losses, 'skipped': skipped}, args)
                log.line({'epoch': run.epoch, 'lr': run.lr, **means, 'images_per_s': rate, 'waited_s': waited})
            if run.is_recovery_point():
                _save(run, checkpoints)
        asked = time.perf_counter()
    log.epoch(_mean_of_processes({name: value / run.updates_per_epoch for name, value in run.sums.items()}, args))
    run.start_epoch(run.epoch + 1)
    return batch


def _mean_of_processes(values: dict[str, float], args: argparse.Namespace) -> dict[str, float]:
    if not args.distributed:
        return values
    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=args.device)
    return dict(zip(values, reduce_tensor(tensor, args.world_size).tolist()))


def _save(run: Run, checkpoints: Checkpoints) -> None:
    state = run.state_dict()
    if run.args.rank == 0:
        checkpoints.save(state, run.num_updates)
    if run.args.distributed:
        dist.barrier()

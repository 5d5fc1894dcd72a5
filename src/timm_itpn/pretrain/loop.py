"""The loop of pre-training: epochs, checkpoints and log, and the weights at its end."""
import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from timm.utils import AverageMeter

from ..files import replaced
from ..weights.layout import native_to_official
from .checkpoints import Checkpoints, load
from .figures import draw
from .log import Log, check_tensorboard
from .run import Run
from .sharding import model_state
from .weights import to_native

__all__ = ['pretrain']


def pretrain(args: argparse.Namespace) -> dict[str, Any]:
    """Run, or go on with a run.

    Args:
        args: As of `arguments.add_arguments`.

    Returns:
        What was written, for JSON.

    Raises:
        RuntimeError: The loss is no number, a checkpoint cannot be read or written, or weights cannot be had.
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
        check_tensorboard()
    checkpoints = Checkpoints(args.output, args.checkpoint_hist)
    path = resumed_path(args, checkpoints)
    run = Run(args)
    if path is not None:
        run.load_state_dict(load(path), path)
    if run.is_first:
        args.output.mkdir(parents=True, exist_ok=True)
        checkpoints.sweep()
        (args.output / 'args.json').write_text(json.dumps(run.settings, indent=2) + '\n', encoding='utf-8')
    log = Log(args.output, run.total_updates, run.num_updates, run.epoch, run.is_first, args.log_tensorboard)
    while run.epoch < args.epochs:
        run_epoch(run, checkpoints, log)
    log.close()
    return export(run)


def run_epoch(run: Run, checkpoints: Checkpoints, log: Log) -> None:
    """The rest of an epoch, with checkpoints and log."""
    args = run.args
    images = args.batch_size * args.grad_accum_steps * args.world_size
    meters: dict[str, AverageMeter] = {}
    parts: list[dict[str, torch.Tensor]] = []  # losses of the batches of an update
    start, waited = time.perf_counter(), 0.
    run.task.train()
    batches = run.batches()
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        waited += time.perf_counter() - asked
        if batch is None:
            break
        last, before = batch, run.num_updates
        parts.append(run.step(batch))
        if run.num_updates == before:
            continue
        losses = {name: torch.stack([part[name] for part in parts]).mean().item() for name in parts[0]}
        parts = []
        for name, value in losses.items():
            meters.setdefault(name, AverageMeter()).update(value)
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        log.update(images / seconds, epoch=run.epoch, loss=f'{losses["loss"]:.4f}')
        if run.num_updates % args.log_interval == 0:
            log.line(run.num_updates, {
                'epoch': run.epoch, 'lr': run.lr, **averaged(losses, args), 'images_per_s': images / seconds,
                'waited_s': waited, 'skipped': run.skipped})
        ends = run.batch // args.grad_accum_steps == run.updates_per_epoch
        if args.recovery_interval and run.num_updates % args.recovery_interval == 0 and not ends and run.sampler:
            save(run, checkpoints)
    log.epoch(run.epoch, averaged({name: meter.avg for name, meter in meters.items()}, args), run.lr)
    run.epoch, run.batch = run.epoch + 1, 0
    if args.figure_interval and run.epoch % args.figure_interval == 0 and run.is_first:
        target = None if run.task.teacher is None else run.task.teacher(last['teacher_images'])
        draw(args.output / f'epoch-{run.epoch:04d}.png', run.objective, last, target, run.view)
    save(run, checkpoints)


def averaged(values: dict[str, float], args: argparse.Namespace) -> dict[str, float]:
    """Mean over the processes."""
    if not args.distributed:
        return values
    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=args.device)
    dist.all_reduce(tensor)
    return dict(zip(values, (tensor / args.world_size).tolist()))


def save(run: Run, checkpoints: Checkpoints) -> None:
    state = run.state_dict()
    if run.is_first:
        checkpoints.save(state, run.num_updates)
    if run.args.distributed:
        dist.barrier()


def export(run: Run) -> dict[str, Any]:
    """Write the weights in both layouts; every process has to call it, the first writes and tells."""
    state_dict = model_state(run.objective, run.args.fsdp)
    if run.ema is not None:
        averaged_state = model_state(run.ema.module, run.args.fsdp)
        state_dict.update({f'backbone.{key}': value for key, value in averaged_state.items()})
    if not run.is_first:
        return {}
    native = {key: value.detach().cpu().contiguous() for key, value in to_native(state_dict).items()}
    written = {'native': run.args.output / 'pretrained.safetensors', 'official': run.args.output / 'pretrained.pth'}
    with replaced(written['native']) as part:
        save_file(native, part, metadata={'format': 'pt', 'model': run.args.model})
    with replaced(written['official']) as part:
        torch.save({'model': {key: value.clone() for key, value in native_to_official(native).items()}}, part)
    return {'num_updates': run.num_updates, 'skipped': run.skipped, **{key: str(path) for key, path in written.items()}}


def resumed_path(args: argparse.Namespace, checkpoints: Checkpoints) -> Path | None:
    """The checkpoint to go on from, None to start.

    Raises:
        ValueError: There is a run in the folder, and --resume was not given.
    """
    last = checkpoints.last()
    if args.resume == 'auto':
        if last is None:
            print(f'no checkpoint in {args.output}: starting', file=sys.stderr)
        return last
    if args.resume:
        return Path(args.resume)
    if last is not None:
        raise ValueError(f'{args.output} holds a run: go on with --resume auto, or name another folder with --output.')
    return None

"""A training run: task, batches, optimizer and schedule, their state, and one step."""
import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.distributed.fsdp import FSDPModule

from .checkpoints import random_state, set_random_state
from .data import Batches
from .sharding import load_whole_state, shard, whole_state
from .task import PretrainTask

__all__ = ['Batch', 'Run']

Batch = dict[str, torch.Tensor]


class Run:
    """What a run consists of, and how far it is.

    Args:
        args: Arguments of the command, after timm's `init_distributed_device`.
        settings: What the result depends on, see `arguments.settings_of`.
        task: Gives the losses of a batch.
        batches: Of this process.

    Attributes:
        epoch: The current one, from 0.
        batch: Batches of that epoch that are done.
        num_updates: Updates of the weights so far.
        skipped: Files so far that could not be read.

    Raises:
        ValueError: An argument is not usable.
    """

    def __init__(self, args: argparse.Namespace, settings: dict[str, Any], task: PretrainTask, batches: Batches):
        self.args = args
        self.settings = settings
        self.task = task
        self.batches = batches
        self.objective = task.objective
        self.updates_per_epoch = batches.per_epoch // args.grad_accum_steps
        if self.updates_per_epoch == 0:
            raise ValueError(
                f'{batches.num_images} images are fewer than one update takes: {args.batch_size} (--batch-size) x '
                f'{args.grad_accum_steps} (--grad-accum-steps) x {args.world_size} (processes).')
        self.total_updates = args.epochs * self.updates_per_epoch
        self.ema = ModelEmaV3(self.objective.backbone, decay=args.model_ema_decay) if args.model_ema else None
        self.scaler = torch.amp.GradScaler(task.device.type, enabled=task.amp_dtype == torch.float16)
        if args.torchcompile:
            task.compile(backend=args.torchcompile)
        if args.fsdp:
            self._shard()
        elif args.distributed:
            task.prepare_distributed([task.device] if task.device.type == 'cuda' else None)
        self._create_optimizer()
        self.epoch = self.batch = self.num_updates = self.skipped = 0
        self.losses: list[dict[str, torch.Tensor]] = []  # of the batches of an update that is not complete

    def _shard(self) -> None:
        if not self.args.distributed:
            raise ValueError('--fsdp is for several processes: start the run with torchrun.')
        if self.args.figure_interval:
            raise ValueError('--figure-interval does not work with --fsdp: the first process alone cannot predict.')
        shard(self.objective)
        if self.ema is not None:
            shard(self.ema.module)

    def _create_optimizer(self) -> None:
        args = self.args
        images = args.batch_size * args.grad_accum_steps * args.world_size
        lr = args.lr if args.lr is not None else args.lr_base * images / args.lr_base_size
        options = {key: value for key, value in (('eps', args.opt_eps), ('betas', args.opt_betas)) if value is not None}
        self.optimizer = create_optimizer_v2(
            self.objective, opt=args.opt, lr=lr, weight_decay=args.weight_decay, **options)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, args.sched, num_epochs=args.epochs, warmup_epochs=args.warmup_epochs,
            warmup_lr=args.warmup_lr, min_lr=args.min_lr, step_on_epochs=False,
            updates_per_epoch=self.updates_per_epoch)

    @property
    def lr(self) -> float:
        return max(group['lr'] for group in self.optimizer.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on; every process has to call it."""
        states: list[Any] = [random_state()]
        if self.args.distributed:
            states = [None] * self.args.world_size
            dist.all_gather_object(states, random_state())
        return {
            'settings': self.settings,
            'epoch': self.epoch,
            'batch': self.batch,
            'num_updates': self.num_updates,
            'skipped': self.skipped,
            'objective': whole_state(self.objective),
            'optimizer': whole_state(self.objective, self.optimizer),
            'scaler': self.scaler.state_dict(),
            'ema': None if self.ema is None else whole_state(self.ema.module),
            'random_states': states,
        }

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        """Go on from the checkpoint that was read from `path`.

        Raises:
            ValueError: It is of a run with other settings; they are listed.
        """
        was, now = state['settings'], self.settings
        changed = [f'--{key.replace("_", "-")} was {was.get(key)!r}, now {now.get(key)!r}'
                   for key in sorted({*was, *now}) if was.get(key) != now.get(key)]
        if changed:
            raise ValueError(f'{path} is of a run with other settings: {"; ".join(changed)}. Use those, or start anew.')
        load_whole_state(state['objective'], self.objective)
        load_whole_state(state['optimizer'], self.objective, self.optimizer)
        self.scaler.load_state_dict(state['scaler'])
        if self.ema is not None:
            load_whole_state(state['ema'], self.ema.module)
        self.epoch, self.batch = state['epoch'], state['batch']
        self.num_updates, self.skipped = state['num_updates'], state['skipped']
        self.scheduler.step_update(self.num_updates)
        set_random_state(state['random_states'][self.args.rank])

    def rest_of_epoch(self) -> Iterator[Batch]:
        """The batches of the epoch that are not done yet, on the device."""
        last = self.updates_per_epoch * self.args.grad_accum_steps
        for _, batch in zip(range(self.batch, last), self.batches.epoch(self.epoch, self.batch)):
            self.skipped += int(batch.pop('skipped').sum())
            yield {key: value.to(self.task.device, non_blocking=True) for key, value in batch.items()}

    def is_recovery_point(self) -> bool:
        """A checkpoint is due within the epoch, and one from there can be resumed."""
        interval, ends = self.args.recovery_interval, self.num_updates % self.updates_per_epoch == 0
        return bool(interval) and self.num_updates % interval == 0 and not ends and self.batches.resumable

    def step(self, batch: Batch) -> dict[str, float] | None:
        """Compute the gradients of one batch, and update the weights if it is the last one of an update.

        Returns:
            Losses of the update, means over its batches; None if it is not complete yet.

        Raises:
            RuntimeError: The loss is not finite; the batch is saved.
        """
        completes = (self.batch + 1) % self.args.grad_accum_steps == 0
        if isinstance(self.objective, FSDPModule):
            self.objective.set_requires_gradient_sync(completes)
        with nullcontext() if completes else self.task.no_sync():
            losses = self.task(batch)
            if not torch.isfinite(losses['loss']):
                path = self.args.output / f'not_finite-{self.args.rank}.pt'
                torch.save({'num_updates': self.num_updates, **batch}, path)
                raise RuntimeError(
                    f'The loss is {losses["loss"].item()} in epoch {self.epoch}, update {self.num_updates + 1}; the '
                    f'batch is in {path}. Lower --lr, or use --amp-dtype bfloat16, and go on with --resume auto.')
            self.scaler.scale(losses['loss'] / self.args.grad_accum_steps).backward()
        self.losses.append({key: value.detach() for key, value in losses.items()})
        self.batch += 1
        if not completes:
            return None
        self._update()
        means = {key: torch.stack([losses[key] for losses in self.losses]).mean().item() for key in losses}
        self.losses = []
        return means

    def _update(self) -> None:
        self.scaler.unscale_(self.optimizer)
        if self.args.clip_grad:
            torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.args.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.num_updates += 1
        self.scheduler.step_update(self.num_updates)
        self.objective.after_update(self.num_updates / self.total_updates)
        if self.ema is not None:
            self.ema.update(self.objective.backbone)

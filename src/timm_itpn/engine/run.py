"""A training run: task, batches, optimizer and schedule, their state, and one step."""
import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from ..layers.blocks import AttentionBlock, MlpBlock
from .arguments import CHANGEABLE, FREE
from .checkpoints import REMEDY, save
from .data import NUM_OTHERS, Batches
from .task import Batch, Task

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # every process has to ask, the first gets the state
MAX_UNREADABLE = 0.5  # share of the images of an epoch


class Run:
    """What a run consists of, and how far it is.

    Args:
        args: Arguments of the command, after timm's `init_distributed_device`.
        task: What is trained, and on what.

    Attributes:
        settings: What the result depends on: all arguments but those that are free, and what tells the data.
        epoch: The current one, from 0.
        batch: Batches of that epoch that are done.
        num_updates: Updates of the weights so far.
        sums: Of the losses of the epoch's updates.
        metrics: Of the last evaluation.
        unreadable: Files of the epoch, for which others were taken; a dict to be quick.
        skipped: How many there were in all epochs.

    Raises:
        ValueError: An argument is not usable.
    """

    def __init__(self, args: argparse.Namespace, task: Task):
        self.args = args
        self.task = task
        self.settings = {key: value for key, value in vars(args).items() if key not in FREE + task.FREE}
        self.settings['data'] = task.fingerprint
        self.batches = batches = Batches(
            task.samples, args.batch_size, args.seed, args.workers, args.rank, args.world_size,
            pin_memory=task.device.type == 'cuda')
        self.metrics: Mapping[str, float | None] = {}
        self.images_per_update = args.batch_size * args.grad_accum_steps * args.world_size
        self.updates_per_epoch = batches.per_epoch // args.grad_accum_steps
        if self.updates_per_epoch == 0:
            raise ValueError(
                f'{len(task.samples)} images are fewer than one update takes: {args.batch_size} (--batch-size) x '
                f'{args.grad_accum_steps} (--grad-accum-steps) x {args.world_size} (processes).')
        self.batches_per_epoch = self.updates_per_epoch * args.grad_accum_steps
        self.total_updates = args.epochs * self.updates_per_epoch
        self.averaged = task.model.get_submodule(task.AVERAGED)
        self.ema = ModelEmaV3(self.averaged, decay=args.model_ema_decay) if args.model_ema else None
        self.scaler = torch.amp.GradScaler(task.device.type, enabled=task.amp_dtype == torch.float16)
        if args.torchcompile:
            task.model.get_submodule(task.COMPILED).compile(backend=args.torchcompile)
        if args.fsdp:
            self._shard()
        elif args.distributed:
            device_ids = [task.device] if task.device.type == 'cuda' else None
            task.trainable_module = DistributedDataParallel(task.model, device_ids)
        self._create_optimizer()
        self.num_updates = self.skipped = 0
        self.ahead = 0  # updates by which the schedule is, since the number of images changed
        self.losses: list[dict[str, torch.Tensor]] = []  # of the batches of an update that is not complete
        self.start_epoch(0)

    def _shard(self) -> None:
        if not self.args.distributed:
            raise ValueError('--fsdp is for several processes: start the run with torchrun.')
        if self.args.figure_interval:
            raise ValueError('--figure-interval does not work with --fsdp: the first process alone cannot predict.')
        for module in (self.task.model, self.ema.module) if self.ema is not None else (self.task.model,):
            for block in module.modules():
                if isinstance(block, (AttentionBlock, MlpBlock)):
                    fully_shard(block)  # its parameters are brought together while it runs
            fully_shard(module)

    def _create_optimizer(self) -> None:
        args = self.args
        lr = args.lr if args.lr is not None else self.task.lr_per_image * self.images_per_update
        options = {key: value for key, value in (('eps', args.opt_eps), ('betas', args.opt_betas)) if value is not None}
        self.optimizer = create_optimizer_v2(
            self.task.model, opt=args.opt, lr=lr, weight_decay=args.weight_decay, **options,
            **self.task.optimizer_kwargs)
        schedule = {**scheduler_kwargs(args), 'decay_epochs': None, 'step_on_epochs': False}  # None: by the schedule
        if args.warmup_updates is not None:
            schedule['warmup_epochs'] = args.warmup_updates / self.updates_per_epoch
        self.scheduler, _ = create_scheduler_v2(self.optimizer, **schedule, updates_per_epoch=self.updates_per_epoch)

    @property
    def lr(self) -> float:
        return max(group['lr'] for group in self.optimizer.param_groups)

    def start_epoch(self, epoch: int) -> None:
        """Go on to the first batch of an epoch."""
        self.epoch, self.batch = epoch, 0
        self.sums: dict[str, float] = {}
        self.unreadable: dict[str, None] = {}

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on; every process has to call it."""
        random = {'torch': torch.get_rng_state()}  # what the model draws from; samples do not depend on it
        if torch.cuda.is_available():
            random['cuda'] = torch.cuda.get_rng_state()
        own = {'random': random, 'sums': self.sums, 'unreadable': self.unreadable, 'skipped': self.skipped}
        processes: list[Any] = [own]
        if self.args.distributed:
            processes = [None] * self.args.world_size
            dist.all_gather_object(processes, own)
        model, optimizer = get_state_dict(self.task.model, self.optimizer, options=WHOLE)
        return {
            'settings': self.settings,
            'epoch': self.epoch,
            'batch': self.batch,
            'num_updates': self.num_updates,
            'ahead': self.ahead,
            'metrics': self.metrics,
            self.task.KEY: model,
            'optimizer': optimizer,
            'scaler': self.scaler.state_dict(),
            'ema': None if self.ema is None else get_model_state_dict(self.ema.module, options=WHOLE),
            'processes': processes,
        }

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        """Go on from the checkpoint that was read from `path`.

        Raises:
            ValueError: It is of a run with other settings or other images; they are listed.
        """
        was, now = (json.loads(json.dumps(each, default=str)) for each in (state['settings'], self.settings))
        changed = {key: f'{_option(key)} was {was.get(key)!r}, now {now.get(key)!r}'
                   for key in sorted({*was, *now}) if was.get(key) != now.get(key)}
        data = changed.pop('data', '')
        told = [changed.pop(key) for key in CHANGEABLE + self.task.CHANGEABLE if key in changed]
        if changed:
            raise ValueError(f'{path} is of a run with other settings: {"; ".join(changed.values())}. Use those, or '
                             'start anew.')
        if data and not self.args.changed_data:
            raise ValueError(f'{path} is of a run with other {data}. Name those with '
                             '--data-dir, or begin the epoch again with these by --changed-data.')
        if told and self.args.rank == 0:
            print(f'going on with other settings: {"; ".join(told)}', file=sys.stderr)
        set_state_dict(
            self.task.model, self.optimizer, model_state_dict=state[self.task.KEY], optim_state_dict=state['optimizer'],
            options=WHOLE)
        if state['scaler']:  # --amp-dtype was float16 then, too
            self.scaler.load_state_dict(state['scaler'])
        if self.ema is not None:
            set_model_state_dict(self.ema.module, state['ema'], options=WHOLE)
        self.epoch, self.batch, self.num_updates = state['epoch'], state['batch'], state['num_updates']
        own = state['processes'][self.args.rank]
        self.sums, self.unreadable, self.skipped = own['sums'], own['unreadable'], own['skipped']
        self.ahead, self.metrics = state['ahead'], state.get('metrics', {})
        if data:
            self.ahead = self.epoch * self.updates_per_epoch - self.num_updates
            self.start_epoch(self.epoch)
        self.scheduler.step_update(self.num_updates + self.ahead)
        torch.set_rng_state(own['random']['torch'])
        if 'cuda' in own['random'] and torch.cuda.is_available():
            torch.cuda.set_rng_state(own['random']['cuda'])

    @property
    def ends_epoch(self) -> bool:
        return self.batch == self.batches_per_epoch

    def rest_of_epoch(self) -> Iterator[Batch]:
        """The batches of the epoch that are not done yet, on the device.

        Raises:
            RuntimeError: There are too few batches, or too many files cannot be read.
        """
        left = range(self.batch, self.batches_per_epoch)
        for _, batch in zip(left, self.batches.epoch(self.epoch, self.batch)):
            self._count(batch.pop('unreadable', []))
            yield tree_map_only(torch.Tensor, lambda x: x.to(self.task.device, non_blocking=True), batch)
        if not self.ends_epoch:
            raise RuntimeError(f'The data end after {self.batch} of {self.batches_per_epoch} batches: lower '
                               '--train-num-samples.')

    def _count(self, unreadable: list[list[str]]) -> None:
        """Note the files of a batch that could not be read, a list for each sample."""
        new = {name: None for names in unreadable for name in names if name not in self.unreadable}
        self.unreadable.update(new)
        self.skipped += len(new)
        most = MAX_UNREADABLE * len(self.task.samples) / self.args.world_size
        if len(self.unreadable) > most or any(len(names) > NUM_OTHERS for names in unreadable):
            raise RuntimeError(f'More than half of the images of an epoch cannot be read, {self.first_unreadable()}: '
                               'mend them, or name others with --data-dir.')

    def first_unreadable(self) -> str:
        """Names of some files of the epoch that cannot be read."""
        return ', '.join([*self.unreadable][:5]) + (', ...' if len(self.unreadable) > 5 else '')

    def is_recovery_point(self) -> bool:
        """A checkpoint is due within the epoch, and one from there can be resumed."""
        interval = self.args.recovery_interval
        return bool(interval) and self.num_updates % interval == 0 and not self.ends_epoch and self.batches.resumable

    def step(self, batch: Batch) -> dict[str, float] | None:
        """Compute the gradients of one batch, and update the weights if it is the last one of an update.

        Returns:
            Losses of the update, means over its batches; None if it is not complete yet.

        Raises:
            RuntimeError: The loss is not finite; the batch is saved.
        """
        completes = (self.batch + 1) % self.args.grad_accum_steps == 0
        if isinstance(self.task.model, FSDPModule):
            self.task.model.set_requires_gradient_sync(completes)
        with nullcontext() if completes else self.task.no_sync():
            losses = self.task(batch)
            if not torch.isfinite(losses['loss']):
                path = self.args.output / f'not_finite-{self.args.rank}.pt'
                save({'num_updates': self.num_updates, **batch}, path)
                raise RuntimeError(
                    f'The loss is {losses["loss"].item()} in epoch {self.epoch}, update {self.num_updates + 1}; the '
                    f'batch is in {path}. {REMEDY}')
            self.scaler.scale(losses['loss'] / self.args.grad_accum_steps).backward()
        self.losses.append({key: value.detach() for key, value in losses.items()})
        self.batch += 1
        if not completes:
            return None
        self._update()
        means = {key: torch.stack([losses[key] for losses in self.losses]).mean().item() for key in losses}
        self.losses = []
        self.sums = {key: self.sums.get(key, 0.) + value for key, value in means.items()}
        return means

    def _update(self) -> None:
        self.scaler.unscale_(self.optimizer)
        if self.args.clip_grad:
            torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), self.args.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.num_updates += 1
        self.scheduler.step_update(self.num_updates + self.ahead)
        self.task.after_update((self.num_updates + self.ahead) / self.total_updates)
        if self.ema is not None:
            self.ema.update(self.averaged)


def _option(setting: str) -> str:
    """A setting by the name that a user knows."""
    names = {'data': 'data:', 'world_size': 'the number of processes'}
    return names.get(setting, f'--{setting.replace("_", "-")}')

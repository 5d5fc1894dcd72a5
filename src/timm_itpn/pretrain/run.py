"""A run of pre-training: what it is made of, its state, and one step of it."""
import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, init_distributed_device, random_seed

from .arguments import FREE, keyword_arguments
from .checkpoints import differences, random_state, set_random_state
from .data import Crop, EpochSampler, MaskMaker, Samples, StreamedSamples, View, create_loader, open_dataset
from .objectives import OBJECTIVES, create_objective, create_student
from .sharding import load_model_state, load_optimizer_state, model_state, optimizer_state, shard
from .task import PretrainTask
from .teacher import Teacher, create_teacher

__all__ = ['Run']

Batch = dict[str, torch.Tensor]


class Run:
    """What a run is made of, and how far it is.

    Args:
        args: As of `arguments.add_arguments`.

    Attributes:
        epoch: That is being run.
        batch: Batches of that epoch that are done.
        num_updates: Of the weights, in the whole run.
        skipped: Files that could not be read, so far.

    Raises:
        RuntimeError: Weights of the teacher cannot be had, or the device is not there.
        ValueError: An argument is not usable.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.settings = settings_of(args)
        self.device = init_device(args)
        self.settings['world_size'] = args.world_size
        self.is_first = args.rank == 0
        random_seed(args.seed, 0)  # the same weights in all processes
        if args.deterministic:
            torch.use_deterministic_algorithms(True)
        student = create_student(
            args.model, args.objective, args.img_size, drop_path_rate=args.drop_path,
            **keyword_arguments(args.model_kwargs))
        grid_size = student.patch_embed.grid_size
        teacher = self.create_teacher(grid_size)
        teacher_dim: Any = None if teacher is None else teacher.dim
        self.objective: Any = create_objective(
            args.objective, student, args.mask_ratio, teacher_dim, **keyword_arguments(args.objective_kwargs))
        self.objective.to(self.device)
        self.objective.set_grad_checkpointing(args.grad_checkpointing)
        self.samples, self.sampler = self.create_samples(grid_size, student, teacher)
        self.ema = ModelEmaV3(student, decay=args.model_ema_decay) if args.model_ema else None
        amp_dtype = getattr(torch, args.amp_dtype) if args.amp else None
        self.task = PretrainTask(self.objective, teacher, self.device, amp_dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype == torch.float16)
        if args.torchcompile:
            self.task.compile(args.torchcompile)
        if args.fsdp:
            self.shard()
        elif args.distributed:
            self.task.prepare_distributed([self.device] if self.device.type == 'cuda' else None)
        self.create_optimizer()
        random_seed(args.seed, args.rank)
        self.epoch = self.batch = self.num_updates = self.skipped = 0

    def create_teacher(self, grid_size: tuple[int, int]) -> Teacher | None:
        args = self.args
        if args.teacher is None:
            if OBJECTIVES[args.objective].TEACHER:
                raise ValueError(
                    f'The objective {args.objective} needs a teacher: name one with --teacher, '
                    'vit_base_patch16_clip_224.openai say.')
            return None
        return create_teacher(
            args.teacher, grid_size, args.teacher_img_size, checkpoint_path=args.teacher_path or '')

    def create_samples(self, grid_size: tuple[int, int], student: Any, teacher: Teacher | None) -> tuple[Any, Any]:
        """Samples, and the sampler where they have indices."""
        args = self.args
        self.view = view_of(student, student.patch_embed.img_size)
        views = [self.view]
        if teacher is not None:
            views.append(view_of(teacher.model, teacher.img_size))
        crop = Crop(tuple(views), tuple(args.scale), tuple(args.ratio), args.hflip, args.train_interpolation)
        masking = args.masking or self.objective.MASKING
        maker = MaskMaker(grid_size, masking, self.objective.num_masked)
        dataset: Any = open_dataset(
            args.dataset, args.data_dir, args.train_split, batch_size=args.batch_size, seed=args.seed,
            num_samples=args.train_num_samples)
        if hasattr(dataset, 'set_loader_cfg'):  # it has no indices
            dataset.set_loader_cfg(num_workers=max(1, args.workers))
            samples: Any = StreamedSamples(dataset, crop, maker, args.seed, args.rank)
            self.num_batches = len(samples) // (args.batch_size * args.world_size)
            sampler = None
        else:
            samples = Samples(dataset, crop, maker, args.seed)
            sampler = EpochSampler(len(samples), args.batch_size, args.rank, args.world_size, args.seed)
            self.num_batches = sampler.num_batches
        self.updates_per_epoch = self.num_batches // args.grad_accum_steps
        if self.updates_per_epoch == 0:
            raise ValueError(
                f'{len(samples)} images are fewer than one update takes: {args.batch_size} (--batch-size) x '
                f'{args.grad_accum_steps} (--grad-accum-steps) x {args.world_size} (processes).')
        return samples, sampler

    def shard(self) -> None:
        if not self.args.distributed:
            raise ValueError('--fsdp is for several processes: start the run with torchrun.')
        if self.args.figure_interval:
            raise ValueError('--figure-interval does not go with --fsdp: the first process alone cannot predict.')
        shard(self.objective)
        if self.ema is not None:
            shard(self.ema.module)

    def create_optimizer(self) -> None:
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
    def total_updates(self) -> int:
        return self.args.epochs * self.updates_per_epoch

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
            'objective': model_state(self.objective, self.args.fsdp),
            'optimizer': optimizer_state(self.objective, self.optimizer, self.args.fsdp),
            'scaler': self.scaler.state_dict(),
            'ema': None if self.ema is None else model_state(self.ema.module, self.args.fsdp),
            'random_states': states,
        }

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: It is of a run with other settings; they are listed.
        """
        changed = differences(state['settings'], self.settings)
        if changed:
            raise ValueError(f'{path} is of a run with other settings: {"; ".join(changed)}. Use those, or start anew.')
        load_model_state(self.objective, state['objective'], self.args.fsdp)
        load_optimizer_state(self.objective, self.optimizer, state['optimizer'], self.args.fsdp)
        self.scaler.load_state_dict(state['scaler'])
        if self.ema is not None:
            load_model_state(self.ema.module, state['ema'], self.args.fsdp)
        self.epoch, self.batch = state['epoch'], state['batch']
        self.num_updates, self.skipped = state['num_updates'], state['skipped']
        self.scheduler.step_update(self.num_updates)
        set_random_state(state['random_states'][self.args.rank])

    def batches(self) -> Iterator[Batch]:
        """What is left of the epoch, on the device."""
        if self.sampler is None:
            self.samples.set_epoch(self.epoch)
        else:
            self.sampler.epoch, self.sampler.first_batch = self.epoch, self.batch
        loader = create_loader(
            self.samples, self.args.batch_size, self.args.workers, self.sampler, str(self.device))
        last = self.updates_per_epoch * self.args.grad_accum_steps
        for _, batch in zip(range(self.batch, last), loader):
            self.skipped += int(batch.pop('skipped').sum())
            yield {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    def step(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Gradients of one batch, and the update that it completes, if it does.

        Raises:
            RuntimeError: The loss is no number; the batch is saved.
        """
        steps = self.args.grad_accum_steps
        completes = (self.batch + 1) % steps == 0
        if self.args.fsdp:
            self.objective.set_requires_gradient_sync(completes)
        with nullcontext() if completes or self.args.fsdp else self.task.no_sync():
            losses = self.backward(batch, steps)
        self.batch += 1
        if completes:
            self.update()
        return losses

    def backward(self, batch: Batch, steps: int) -> dict[str, torch.Tensor]:
        losses = self.task(batch)
        if not torch.isfinite(losses['loss']):
            path = self.args.output / f'not_finite-{self.args.rank}.pt'
            torch.save({'num_updates': self.num_updates, **batch}, path)
            raise RuntimeError(
                f'The loss is {losses["loss"].item()} in epoch {self.epoch}, update {self.num_updates + 1}; the batch '
                f'is in {path}. Lower --lr, or use --amp-dtype bfloat16, and go on with --resume auto.')
        self.scaler.scale(losses['loss'] / steps).backward()
        return {key: value.detach() for key, value in losses.items()}

    def update(self) -> None:
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

    @property
    def lr(self) -> float:
        return max(group['lr'] for group in self.optimizer.param_groups)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the result depends on, as plain values."""
    settings = {key: value for key, value in vars(args).items() if key not in FREE and key != 'run'}
    for key in ('model_kwargs', 'objective_kwargs'):
        settings[key] = keyword_arguments(settings[key])
    return settings


def init_device(args: argparse.Namespace) -> torch.device:
    if torch.device(args.device).type == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f'--device is {args.device}, but there is no CUDA device: use --device cpu.')
    return init_distributed_device(args)


def view_of(model: Any, size: tuple[int, int]) -> View:
    """How a timm model sees images of `size`."""
    cfg = model.pretrained_cfg
    return View(size, tuple(cfg['mean']), tuple(cfg['std']))

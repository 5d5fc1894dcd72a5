"""Objective and teacher as a task of timm: only the objective is compiled, distributed and averaged."""
import argparse
from typing import Any

import torch
import torch.nn as nn
from timm.task import TrainingTask
from torch.nn.parallel import DistributedDataParallel

from .base import Losses, Objective
from .data import View
from .objectives import create_objective, create_student, creating
from .teacher import Teacher, create_teacher

__all__ = ['PretrainTask', 'create_task']


class PretrainTask(TrainingTask):
    """One step of pre-training.

    Args:
        objective: What is trained.
        teacher: Whose tokens it predicts, None for an objective without teacher.
        device: Where both are.
        amp_dtype: Type of autocast, None for none; the teacher then is of that type.

    Attributes:
        views: How the student, and the teacher if there is one, see images.
    """

    def __init__(
            self, objective: Objective, teacher: Teacher | None, device: torch.device,
            amp_dtype: torch.dtype | None = None):
        super().__init__(device=device, verbose=False)
        self.objective = objective.to(device)
        self.trainable_module: nn.Module = objective
        self.teacher = None if teacher is None else teacher.to(device=device, dtype=amp_dtype)
        self.amp_dtype = amp_dtype
        self.views = [_view(objective.backbone, objective.backbone.patch_embed.img_size)]
        if teacher is not None:
            self.views.append(_view(teacher.model, teacher.img_size))

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> 'PretrainTask':
        self.trainable_module = DistributedDataParallel(self.objective, device_ids=device_ids, **ddp_kwargs)
        return self

    def target(self, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """The teacher's tokens, if there is a teacher."""
        return None if self.teacher is None else self.teacher(batch['teacher_images'])

    def forward(self, input: Any, target: Any = None) -> Losses:
        """Compute the loss of a batch.

        Args:
            input: 'images', 'masked', and for a teacher 'teacher_images'; see `data.SampleMaker`.
            target: Not used: the target is in the images.
        """
        target = self.target(input)
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            return self.trainable_module(input['images'], input['masked'], target)


def create_task(args: argparse.Namespace, device: torch.device) -> PretrainTask:
    """Create student, objective and teacher.

    Args:
        args: Arguments of the command, see `arguments.add_arguments`.
        device: Where the task is.

    Raises:
        ValueError: An argument is not usable, or weights of the teacher cannot be had.
    """
    student = create_student(
        args.model, args.objective, args.img_size, drop_path_rate=args.drop_path, **args.model_kwargs)
    student.set_grad_checkpointing(args.grad_checkpointing)
    teacher: Teacher | None = None
    if args.teacher is not None:
        with creating(f'The teacher {args.teacher}'):
            teacher = create_teacher(
                args.teacher, student.patch_embed.grid_size, args.teacher_img_size, args.teacher_path or '')
    objective = create_objective(
        args.objective, student, args.mask_ratio, None if teacher is None else teacher.dim, **args.objective_kwargs)
    return PretrainTask(objective, teacher, device, getattr(torch, args.amp_dtype) if args.amp else None)


def _view(model: Any, size: tuple[int, int]) -> View:
    """How a timm model sees images of `size`."""
    cfg = model.pretrained_cfg
    return View(size, tuple(cfg['mean']), tuple(cfg['std']))

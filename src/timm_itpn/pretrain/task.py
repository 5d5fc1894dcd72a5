"""Pre-training as a task of the engine: objective and teacher, their samples, and the files at the end."""
import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..engine.loop import train
from ..engine.task import Task, creating
from .base import Losses, Objective
from .data import SampleMaker, Samples, StreamedSamples, View, fingerprint, open_dataset
from .export import export
from .figures import draw
from .masking import MASKINGS
from .objectives import create_objective, create_student
from .teacher import Teacher, create_teacher

__all__ = ['PretrainTask', 'pretrain']

NUM_DRAWN = 8  # images


def pretrain(args: argparse.Namespace) -> dict[str, Any]:
    """Start a run, or go on with one, as the arguments of the command say; see `engine.loop.train`."""
    args.objective = args.objective or ('clip' if args.teacher else 'pixel')
    return train(args, PretrainTask)


class PretrainTask(Task):
    """One step of pre-training.

    Args:
        args: Arguments of the command, see `arguments.add_arguments`.
        device: Where objective and teacher are.

    Attributes:
        teacher: Whose tokens the objective predicts, None without; of the type of autocast.
        views: How the student, and the teacher if there is one, see images.

    Raises:
        ValueError: An argument is not usable, or weights of the teacher cannot be had.
    """
    KEY = 'objective'
    AVERAGED = 'backbone'
    CHANGEABLE = ('lr_base', 'lr_base_size', 'teacher_path')

    def __init__(self, args: argparse.Namespace, device: torch.device):
        dataset = open_dataset(
            args.dataset, args.data_dir, args.train_split, batch_size=args.batch_size, seed=args.seed,
            num_samples=args.train_num_samples)
        objective, teacher = _create(args)
        views = [_view(objective.backbone, objective.backbone.patch_embed.img_size)]
        if teacher is not None:
            views.append(_view(teacher.model, teacher.img_size))
        make = SampleMaker(
            tuple(views), objective.grid_size, MASKINGS[args.masking or objective.MASKING], objective.num_masked,
            args.seed, tuple(args.scale), tuple(args.ratio), args.hflip, args.train_interpolation)
        try:
            make(Image.new('RGB', (2, 2)), 0)
        except Exception as error:  # of torchvision, for sizes that cannot be drawn
            raise ValueError(f'--scale, --ratio or --train-interpolation cannot be used: {error}') from error
        samples = (StreamedSamples(dataset, make, args.rank, args.workers) if hasattr(dataset, 'set_loader_cfg')
                   else Samples(dataset, make))
        super().__init__(args, device, objective, samples, fingerprint(dataset))
        self.teacher = None if teacher is None else teacher.to(device=device, dtype=self.amp_dtype)
        self.views = views
        self.lr_per_image = args.lr_base / args.lr_base_size

    def target(self, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """The teacher's tokens, if there is a teacher."""
        return None if self.teacher is None else self.teacher(batch['teacher_images'])

    def forward(self, input: Any, target: Any = None) -> Losses:
        """Losses of a batch of `data.SampleMaker`; the target is in the images."""
        target = self.target(input)
        with self.autocast():
            return self.trainable_module(input['images'], input['masked'], target)

    def after_update(self, progress: float) -> None:
        self.model.after_update(progress)

    def draw(self, path: Path, batch: dict[str, torch.Tensor]) -> None:
        batch = {key: value[:NUM_DRAWN] for key, value in batch.items()}
        draw(path, self.model, self.views[0], batch, self.target(batch))

    def export(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> dict[str, Path]:
        return export(folder, state_dict, self.metadata())


def _create(args: argparse.Namespace) -> tuple[Objective, Teacher | None]:
    """Student with objective, and teacher."""
    with creating(f'The student {args.model}'):
        student = create_student(
            args.model, args.objective, args.img_size, drop_path_rate=args.drop_path, **args.model_kwargs)
    student.set_grad_checkpointing(args.grad_checkpointing)
    teacher: Teacher | None = None
    if args.teacher is not None:
        with creating(f'The teacher {args.teacher}'):
            teacher = create_teacher(
                args.teacher, student.patch_embed.grid_size, args.teacher_img_size, args.teacher_path or '')
    elif args.teacher_path or args.teacher_img_size:
        raise ValueError('--teacher-path and --teacher-img-size are of a teacher: name it with --teacher.')
    with creating(f'The objective {args.objective}'):
        return create_objective(
            args.objective, student, args.mask_ratio, None if teacher is None else teacher.dim,
            **args.objective_kwargs), teacher


def _view(model: Any, size: tuple[int, int]) -> View:
    """How a timm model sees images of `size`."""
    cfg = model.pretrained_cfg
    return View(size, tuple(cfg['mean']), tuple(cfg['std']))

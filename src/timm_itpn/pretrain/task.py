"""Pre-training as a task of the engine: objective and teacher, their samples, pictures, and the files at the end."""
import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from torchvision.utils import save_image

from ..engine.checkpoints import save
from ..engine.loop import train
from ..engine.task import Batch, Losses, Task, creating
from ..files import replaced
from ..weights.layout import ITPN, PRETRAIN, native_to_official
from .base import Objective
from .data import MASKINGS, SampleMaker, Samples, StreamedSamples, View, fingerprint, open_dataset
from .objectives import create_objective, create_student
from .pixel import STRIDE, Pixel, pixels
from .teacher import Teacher, create_teacher

NUM_DRAWN = 8  # images
GREY = 0.5
BACKBONE = 'backbone.'
BRANCH = 'cls_pt_layers.'  # the auxiliary branch of `clip-distill`, whose blocks have official names in a file
BRANCH_NAMES = {native: official for native, (official,) in ITPN.attention_block.items()}


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
        seeing: list[tuple[Any, tuple[int, int]]] = [(objective.backbone, objective.backbone.patch_embed.img_size)]
        if teacher is not None:
            seeing.append((teacher.model, teacher.img_size))
        views = [View(size, model.pretrained_cfg['mean'], model.pretrained_cfg['std']) for model, size in seeing]
        make = SampleMaker(
            tuple(views), objective.grid_size, MASKINGS[args.masking or objective.MASKING], objective.num_masked,
            tuple(args.scale), tuple(args.ratio), args.hflip, args.train_interpolation)
        try:
            make(Image.new('RGB', (2, 2)))
        except Exception as error:  # of torchvision, for sizes that cannot be drawn
            raise ValueError(f'--scale, --ratio or --train-interpolation cannot be used: {error}') from error
        samples = (
            StreamedSamples(dataset, make, args.seed, args.rank, args.workers) if hasattr(dataset, 'set_loader_cfg')
            else Samples(dataset, make))
        super().__init__(args, device, objective, samples, fingerprint(dataset))
        self.teacher = None if teacher is None else teacher.to(device=device, dtype=self.amp_dtype)
        self.views = views
        self.lr_per_image = args.lr_base / args.lr_base_size

    def forward(self, input: Any, target: Any = None) -> Losses:
        """Losses of a batch of `data.SampleMaker`; the target is in the images."""
        target = None if self.teacher is None else self.teacher(input['teacher_images'])
        with self.autocast():
            return self.trainable_module(input['images'], input['masked'], target)

    def after_update(self, progress: float) -> None:
        self.model.after_update(progress)

    @torch.no_grad()
    def draw(self, path: Path, batch: Batch) -> None:
        """Draw some images of a batch, one per column.

        Rows for objectives of pixels: image, what is visible of it, prediction. For those of a teacher: image, what is
        visible, similarity of each predicted token to the teacher's (dark: none).
        """
        batch = {key: value[:NUM_DRAWN] for key, value in batch.items()}
        images, masked, view = batch['images'], batch['masked'], self.views[0]
        seen, hidden = _unnormalised(images, view), _to_pixels(masked)
        rows = [seen, torch.where(hidden, GREY, seen)]
        prediction = self.model.eval().predict(images, masked)
        if isinstance(self.model, Pixel):
            # with the mean and deviation that the objective takes away
            variance, mean = torch.var_mean(pixels(images), dim=-1, keepdim=True)
            predicted = rearrange(
                prediction.float() * variance.sqrt() + mean, 'b (h w) (y x c) -> b c (h y) (w x)', h=masked.shape[1],
                y=STRIDE, x=STRIDE)
            rows.append(torch.where(hidden, _unnormalised(predicted, view), seen))
        elif self.teacher is not None:
            tokens = prediction[0] if isinstance(prediction, tuple) else prediction
            similarity = F.cosine_similarity(tokens.float(), self.teacher(batch['teacher_images']), dim=-1)
            rows.append(_to_pixels(similarity.reshape(masked.shape)).expand(-1, 3, -1, -1))
        with replaced(path) as part:
            save_image(torch.cat(rows).clamp(0, 1), part, nrow=len(images), pad_value=1.)

    def export(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> dict[str, Path]:
        """Write the weights in both layouts, with what they are; gives the files by layout."""
        files = {'native': folder / 'pretrained.safetensors', 'official': folder / 'pretrained.pth'}
        native, metadata = native_weights(state_dict), self.metadata()
        with replaced(files['native']) as part:
            save_file(native, part, metadata=metadata)
        official = {key: value.clone() for key, value in native_to_official(native).items()}
        save({'model': official, 'args': json.loads(metadata['args'])}, files['official'])
        return files


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


def _to_pixels(tokens: torch.Tensor) -> torch.Tensor:
    """One value per token (B, h, w) -> one per pixel (B, 1, H, W)."""
    return tokens.repeat_interleave(STRIDE, 1).repeat_interleave(STRIDE, 2)[:, None]


def _unnormalised(images: torch.Tensor, view: View) -> torch.Tensor:
    """Images in 0..1 again."""
    mean, std = (images.new_tensor(values).reshape(1, -1, 1, 1) for values in (view.mean, view.std))
    return images.float() * std + mean


def native_weights(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of an objective -> native weights.

    What only pre-training needs has `pretrain.` before its official name; the average of `mfm` is left out.
    """
    native = {}
    for key, value in state_dict.items():
        if key.startswith(BACKBONE):
            native[key.removeprefix(BACKBONE)] = value
        elif key.startswith(BRANCH):
            branch, number, name = key.split('.', 2)
            native[f'{PRETRAIN}{branch}.{number}.{BRANCH_NAMES.get(name, name)}'] = value
        elif not key.startswith('average.'):
            native[PRETRAIN + key] = value
    return native

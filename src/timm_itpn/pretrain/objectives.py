"""The objectives by name, and how one is created with its student."""
import math
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.layers import trunc_normal_

from ..models import check_name
from . import OBJECTIVE_NAMES
from .base import Objective, Student
from .clip import Clip, ClipDistill
from .pixel import Mfm, Pixel

OBJECTIVES: dict[str, type[Objective]] = {cls.NAME: cls for cls in (Clip, ClipDistill, Pixel, Mfm)}
assert tuple(OBJECTIVES) == OBJECTIVE_NAMES

SCALED = ('mlp.fc1', 'mlp.fc1_g', 'mlp.fc1_x', 'mlp.fc2', 'attn.proj')


def create_student(name: str, objective: str, img_size: int, **kwargs: Any) -> Student:
    """Create the student of an objective, with new weights and without classifier.

    Args:
        name: Model of this package.
        objective: Key of `OBJECTIVES`.
        img_size: Side of its images in pixels.
        kwargs: For the model.

    Raises:
        ValueError: There is no such model. Constructors raise anything for arguments that are not usable.
    """
    check_name(name)
    family: Any = timm.create_model(name, device='meta').family
    needs = OBJECTIVES[objective].STUDENT.get(family, {})
    student: Any = timm.create_model(name, img_size=img_size, num_classes=0, **{**needs, **kwargs})
    if student.pyramid is not None:
        student.prune_intermediate_layers([0, 1, 2])  # the head; the pyramid stays
    return student


def create_objective(
        name: str, student: Student, mask_ratio: float | None = None, teacher_dim: int | None = None,
        **kwargs: Any) -> Objective:
    """Create an objective with new weights, the student's too.

    Args:
        name: Key of `OBJECTIVES`.
        student: From `create_student`.
        mask_ratio: Share of the tokens that are masked; None for the paper's.
        teacher_dim: Channels of the teacher's tokens, None without teacher.
        kwargs: For the objective.

    Raises:
        ValueError: The objective needs a teacher, or takes none; the student does not fit; or there are not so many
            tokens.
    """
    cls = OBJECTIVES[name]
    if cls.TEACHER and teacher_dim is None:
        raise ValueError(f'The objective {name} needs a teacher: --teacher vit_base_patch16_clip_224.openai, say.')
    if not cls.TEACHER and teacher_dim is not None:
        raise ValueError(f'The objective {name} takes no teacher: leave out --teacher.')
    height, width = student.patch_embed.grid_size
    num_masked = round((cls.MASK_RATIO if mask_ratio is None else mask_ratio) * height * width)
    if not 0 < num_masked < height * width:
        raise ValueError(
            f'{num_masked} masked tokens of a {height} x {width} grid: there must be at least 1, and at most '
            f'{height * width - 1}. Choose another --mask-ratio.')
    if cls.TEACHER:
        kwargs['teacher_dim'] = teacher_dim
    initialise(student)
    return cls(student, num_masked, **kwargs)


@torch.no_grad()
def initialise(student: Student) -> None:
    """Initialise a Fast-iTPN for pre-training, as published; the other models start as they are created.

    Matrices of stage 3 are xavier normal, each on its own, their biases zero; the stem is xavier uniform, seen as a
    matrix; positions are trunc normal of 0.02, cut at one standard deviation. Then every MLP, the values and what
    follows attention are scaled by sqrt(ln(2 * depth of stage 3)).
    """
    if student.family != 'fast_itpn':
        return
    stage: Any = student.stages[2]
    stem = student.patch_embed.proj.weight
    nn.init.xavier_uniform_(stem.view(len(stem), -1))
    trunc_normal_(stage.pos_embed, std=.02, a=-.02, b=.02)
    scale = math.sqrt(math.log(2 * len(stage.blocks)))
    for name, module in student.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        leaf = '.'.join(name.split('.')[-2:])
        if name.startswith('stages.2.blocks.'):
            for matrix in module.weight.chunk(3 if leaf == 'attn.qkv' else 1):
                nn.init.xavier_normal_(matrix)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if leaf == 'attn.qkv':
            module.weight.chunk(3)[2].mul_(scale)  # the values
        elif leaf in SCALED:
            module.weight.mul_(scale)
            module.bias.mul_(scale)

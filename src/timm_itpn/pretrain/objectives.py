"""The objectives by name, and how one is built with its student."""
from typing import Any

import timm

from ..models.itpn import ITPN
from ..models.names import check_name
from .clip import Clip, ClipDistill
from .initialise import initialise
from .masking import check_num_masked
from .objective import Objective
from .pixel import Mfm, Pixel

__all__ = ['OBJECTIVES', 'create_objective', 'create_student']

OBJECTIVES: dict[str, type[Objective]] = {cls.NAME: cls for cls in (Clip, ClipDistill, Pixel, Mfm)}


def create_student(name: str, objective: str, img_size: int, **kwargs: Any) -> ITPN:
    """Create the student of an objective, with new weights and without classifier.

    Args:
        name: Model of this package.
        objective: Key of `OBJECTIVES`.
        img_size: Side of its images in pixels.
        kwargs: For the model.

    Raises:
        ValueError: The objective is not for this family.
    """
    check_name(name)
    needs = OBJECTIVES[objective].STUDENT
    family = timm.create_model(name, device='meta').family
    model = timm.create_model(name, img_size=img_size, num_classes=0, **{**needs.get(family, {}), **kwargs})
    if model.pyramid is not None:
        model.prune_intermediate_layers([0, 1, 2])  # the head; the pyramid stays
    return model


def create_objective(
        name: str,
        student: ITPN,
        mask_ratio: float | None = None,
        teacher_dim: int | None = None,
        **kwargs: Any,
) -> Objective:
    """Create an objective with new weights, the student's too.

    Args:
        name: Key of `OBJECTIVES`.
        student: From `create_student`.
        mask_ratio: Share of the tokens that are masked; None for the paper's.
        teacher_dim: Channels of the teacher's tokens, None without teacher.
        kwargs: For the objective.

    Raises:
        ValueError: The objective wants a teacher, or has no use for one; an argument is unknown; the student does not
            fit; or there are not so many tokens.
    """
    cls = OBJECTIVES[name]
    if cls.TEACHER != (teacher_dim is not None):
        raise ValueError(f'The objective {name} {"needs a" if cls.TEACHER else "has no"} teacher: --teacher.')
    height, width = student.patch_embed.grid_size
    num_masked = round((cls.MASK_RATIO if mask_ratio is None else mask_ratio) * height * width)
    check_num_masked(num_masked, (height, width))
    if cls.TEACHER:
        kwargs['teacher_dim'] = teacher_dim
    initialise(student)
    try:
        return cls(student, num_masked, **kwargs)
    except TypeError as error:
        raise ValueError(f'The objective {name} cannot be made: {error}') from error

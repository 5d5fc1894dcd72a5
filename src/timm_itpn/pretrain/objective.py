"""What all objectives of pre-training have in common."""
from typing import Any

import torch
import torch.nn as nn

from ..models.itpn import ITPN
from .student import check_student

__all__ = ['Objective']


class Objective(nn.Module):
    """A student with what predicts and compares. `forward` gives the loss.

    Attributes:
        NAME: Key of `OBJECTIVES`.
        TEACHER: Wants tokens of a teacher.
        MASKING: Key of `MASKINGS`, what the paper uses.
        MASK_RATIO: Share of the tokens that are masked, what the paper uses.
        STUDENT: Arguments of the student, by the name of its class.

    Args:
        backbone: The student; the classifier is taken off.
        num_masked: Tokens that are masked in every image.
    """
    NAME = ''
    TEACHER = False
    MASKING = 'block'
    MASK_RATIO = 75 / 196
    STUDENT: dict[str, dict[str, Any]] = {}

    def __init__(self, backbone: ITPN, num_masked: int):
        super().__init__()
        if type(backbone).__name__ not in self.STUDENT:
            raise ValueError(
                f'The objective {self.NAME} is for {" and ".join(self.STUDENT)}, not for {type(backbone).__name__}.')
        check_student(backbone)
        self.backbone = backbone
        self.num_masked = num_masked
        self.grid_size = backbone.patch_embed.grid_size

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, for timm's optimizer factory."""
        return {f'backbone.{name}' for name in self.backbone.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the student's blocks in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)

    def after_update(self, progress: float) -> None:
        """Called after each update of the weights.

        Args:
            progress: Share of all updates that are done, 0..1.
        """

    def forward(
            self,
            images: torch.Tensor,
            masked: torch.Tensor,
            target: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the loss.

        Args:
            images: (B, 3, H, W), normalised for the student.
            masked: (B, H / 16, W / 16), True = hidden from the student, `num_masked` in every image.
            target: Teacher's tokens (B, H * W / 256, teacher_dim), if there is one.

        Returns:
            'loss', and its parts if it has several: scalars, float32.
        """
        raise NotImplementedError  # every objective has its own

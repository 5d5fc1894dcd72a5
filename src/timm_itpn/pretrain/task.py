"""Objective and teacher as a task of timm: what is compiled, distributed and averaged is the objective alone."""
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.task import TrainingTask
from torch.nn.parallel import DistributedDataParallel

from .objective import Objective
from .teacher import Teacher

__all__ = ['PretrainTask']


class PretrainTask(TrainingTask):
    """One step of pre-training.

    Args:
        objective: What is trained.
        teacher: What it learns from, None for nothing but images.
        device: Where both are.
        amp_dtype: Type of autocast, None for none; the teacher then is of that type.
    """

    def __init__(
            self,
            objective: Objective,
            teacher: Teacher | None,
            device: torch.device,
            amp_dtype: torch.dtype | None = None,
    ):
        super().__init__(device=device, verbose=False)
        self.objective = objective
        self.trainable_module: Any = objective
        self.teacher = teacher
        self.amp_dtype = amp_dtype
        if teacher is not None:
            teacher.to(device=device, dtype=amp_dtype)

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> 'PretrainTask':
        self.trainable_module = DistributedDataParallel(self.objective, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(self, backend: str = 'inductor', mode: str | None = None, **kwargs: Any) -> Objective:
        self.objective.compile(backend=backend, mode=mode, **kwargs)
        return self.objective

    def autocast(self) -> AbstractContextManager:
        """Autocast, if it is on."""
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)

    def forward(self, input: dict[str, torch.Tensor], target: Any = None) -> dict[str, torch.Tensor]:
        """Compute the loss of a batch.

        Args:
            input: 'images', 'masked', and for a teacher 'teacher_images'; see `data.MaskMaker.sample`.
            target: Not used: the target is in the images.
        """
        features = None if self.teacher is None else self.teacher(input['teacher_images'])
        with self.autocast():
            return self.trainable_module(input['images'], input['masked'], features)

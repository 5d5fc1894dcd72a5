"""What kinds of training differ in: the model, its loss and data, its figures, and what is measured and written."""
import json
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from timm.task import TrainingTask

Batch = dict[str, Any]
Losses = dict[str, torch.Tensor]


class Task(TrainingTask):
    """What is trained, and on what. A kind of training is a subclass that computes the loss of a batch in `forward`.

    Args:
        args: Of the command, see `arguments.add_common_arguments`.
        device: Of the model.
        model: What is trained, and what checkpoints hold; only it is distributed and averaged.
        samples: Of an epoch, see `data.Batches`.
        fingerprint: What tells these data from others.

    Attributes:
        amp_dtype: Type of autocast, None for none.
        trainable_module: The model, or what distributes it; `forward` calls it.
        lr_per_image: Learning rate, if there is no --lr, by the number of images per update.
        optimizer_kwargs: For timm's optimizer factory, besides what the common arguments say.
    """
    KEY = 'model'  # of the model in checkpoints
    AVERAGED = COMPILED = ''  # names of the module whose weights --model-ema averages, and that --torchcompile compiles
    FREE: tuple[str, ...] = ()  # further arguments as in `arguments.FREE`
    CHANGEABLE: tuple[str, ...] = ()

    def __init__(self, args: Namespace, device: torch.device, model: nn.Module, samples: Any, fingerprint: str):
        super().__init__(device=device, verbose=False)
        self.args = args
        self.model: Any = model.to(device)
        self.trainable_module: nn.Module = self.model
        self.samples = samples
        self.fingerprint = fingerprint
        self.amp_dtype = getattr(torch, args.amp_dtype) if args.amp else None
        self.lr_per_image = 0.
        self.optimizer_kwargs: dict[str, Any] = {}

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def after_update(self, progress: float) -> None:
        """Called after an update, with the share of all updates that are done."""

    def evaluate(self, model: nn.Module, epoch: int | None) -> Mapping[str, float | None]:
        """Measure a model, at the end of an epoch if one is given: the same names after each, perhaps without values.

        Every process has to call it; the first gets what was measured.
        """
        return {}

    def draw(self, path: Path, batch: Batch) -> None:
        """Write a PNG of what the model predicts, perhaps for a batch."""
        raise NotImplementedError  # every kind has its own

    def metadata(self) -> dict[str, str]:
        """For the header of a safetensors file: what the model was created with, by timm's names."""
        said = {key: vars(self.args)[key] for key in ('model', 'model_kwargs', 'img_size') if key in self.args}
        return {'format': 'pt', 'model': self.args.model, 'args': json.dumps(said, default=str)}

    def export(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> dict[str, Path]:
        """Write the weights at the end of a run; gives the files by what they are."""
        raise NotImplementedError  # every kind has its own


@contextmanager
def creating(what: str) -> Iterator[None]:
    """Whatever unsuitable arguments make a constructor raise is a ValueError with a sentence."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Initializing zero-element')  # of a size of 0, which is refused later
            yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError) as error:
        why = ' '.join(str(error).split())[:300]
        raise ValueError(f'{what} cannot be created: {type(error).__name__} {why}') from error

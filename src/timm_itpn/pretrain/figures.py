"""Pictures of what an objective predicts, for a few images of a batch."""
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torchvision.utils import save_image

from ..files import replaced
from .base import Objective
from .data import View
from .pixel import STRIDE, Pixel, pixels

__all__ = ['draw']

GREY = 0.5


@torch.no_grad()
def draw(path: Path, objective: Objective, view: View, batch: dict[str, torch.Tensor], target: Any) -> None:
    """Write a PNG: one column per image.

    Rows for objectives of pixels: image, what is visible of it, prediction. For those of a teacher: image, what is
    visible, similarity of each predicted token to the teacher's (dark: none).

    Args:
        path: Of the PNG.
        objective: What predicts.
        view: How the student sees images.
        batch: 'images' and 'masked', as for the task.
        target: The teacher's tokens, None without teacher.
    """
    images, masked = batch['images'], batch['masked']
    training = objective.training
    objective.eval()
    seen = _unnormalised(images, view)
    hidden = _to_pixels(masked)
    rows = [seen, torch.where(hidden, GREY, seen)]
    prediction = objective.predict(images, masked)
    if isinstance(objective, Pixel):
        # with the mean and deviation that the objective takes away
        variance, mean = torch.var_mean(pixels(images), dim=-1, keepdim=True)
        predicted = rearrange(
            prediction.float() * variance.sqrt() + mean, 'b (h w) (y x c) -> b c (h y) (w x)', h=masked.shape[1],
            y=STRIDE, x=STRIDE)
        rows.append(torch.where(hidden, _unnormalised(predicted, view), seen))
    elif target is not None:
        tokens = prediction[0] if isinstance(prediction, tuple) else prediction
        similarity = F.cosine_similarity(tokens.float(), target.float(), dim=-1).reshape(masked.shape)
        rows.append(_to_pixels(similarity).expand(-1, 3, -1, -1))
    objective.train(training)
    with replaced(path) as part:
        save_image(torch.cat(rows).clamp(0, 1), part, nrow=len(images), pad_value=1.)


def _to_pixels(tokens: torch.Tensor) -> torch.Tensor:
    """One value per token (B, h, w) -> one per pixel (B, 1, H, W)."""
    return tokens.repeat_interleave(STRIDE, 1).repeat_interleave(STRIDE, 2)[:, None]


def _unnormalised(images: torch.Tensor, view: View) -> torch.Tensor:
    """Images in 0..1 again."""
    mean, std = (images.new_tensor(values).reshape(1, -1, 1, 1) for values in (view.mean, view.std))
    return images.float() * std + mean

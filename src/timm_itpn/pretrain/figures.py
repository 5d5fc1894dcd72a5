"""Pictures of what an objective predicts, for a few images of the last batch."""
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torchvision.utils import make_grid

from ..files import replaced
from .objective import Objective
from .pixel import STRIDE, Pixel, pixels

__all__ = ['draw']

NUM_IMAGES = 8
GREY = 0.5


@torch.no_grad()
def draw(path: Path, objective: Objective, batch: dict[str, torch.Tensor], target: Any, view: Any) -> None:
    """Write a PNG: one column per image.

    Rows for objectives of pixels: image, what is visible of it, prediction. For those of a teacher: image, what is
    visible, similarity of each predicted token to the teacher's (dark: none).

    Args:
        path: Of the PNG.
        objective: What predicts.
        batch: 'images' and 'masked'.
        target: Teacher's tokens, if there is a teacher.
        view: How the student sees images.
    """
    images, masked = batch['images'][:NUM_IMAGES], batch['masked'][:NUM_IMAGES]
    training = objective.training
    objective.eval()
    seen = unnormalised(images, view.mean, view.std)
    hidden = spread(masked)
    rows: list[torch.Tensor] = [seen, torch.where(hidden, torch.full_like(seen, GREY), seen)]
    if isinstance(objective, Pixel):
        predicted = unnormalised(reconstructed(objective, images, masked), view.mean, view.std)
        rows.append(torch.where(hidden, predicted, seen))
    else:
        rows.append(similarity_map(objective, images, masked, target[:NUM_IMAGES]))
    objective.train(training)
    grid = make_grid(torch.cat(rows).clamp(0, 1).cpu(), nrow=len(images), padding=2, pad_value=1.)
    with replaced(path) as part:
        Image.fromarray((grid * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(part)


def reconstructed(objective: Pixel, images: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Predicted pixels, with the mean and deviation that the objective takes away."""
    variance, mean = torch.var_mean(pixels(images), dim=-1, keepdim=True)
    prediction = objective.predict(images, masked).float() * variance.sqrt() + mean
    return rearrange(
        prediction, 'b (h w) (y x c) -> b c (h y) (w x)', h=masked.shape[1], y=STRIDE, x=STRIDE)


def similarity_map(
        objective: Objective,
        images: torch.Tensor,
        masked: torch.Tensor,
        target: torch.Tensor,
) -> torch.Tensor:
    """Cosine similarity of prediction and target of each token, as grey images."""
    prediction = objective.predict(images, masked)
    prediction = prediction[0] if isinstance(prediction, tuple) else prediction
    similarity = torch.nn.functional.cosine_similarity(prediction.float(), target.float(), dim=-1)
    return spread(similarity.reshape(masked.shape)).expand(-1, 3, -1, -1)


def spread(tokens: torch.Tensor) -> torch.Tensor:
    """One value per token (B, h, w) -> one per pixel (B, 1, H, W)."""
    return tokens.repeat_interleave(STRIDE, 1).repeat_interleave(STRIDE, 2)[:, None]


def unnormalised(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Images in 0..1 again."""
    shape = (1, -1, 1, 1)
    return images.float() * images.new_tensor(std).reshape(shape) + images.new_tensor(mean).reshape(shape)

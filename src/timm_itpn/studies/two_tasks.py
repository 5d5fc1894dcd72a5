"""A model that tells the digit of a canvas, and for each token of it what it is of; how it is trained and tested."""
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import random_seed

from .canvases import NUM_CLASSES, NUM_TEXTURES, Canvases

__all__ = ['TwoTasks', 'batches', 'mean', 'normalised', 'percent', 'schedule', 'test', 'train']

NUM_TOKEN_CLASSES = NUM_TEXTURES + NUM_CLASSES
TEXTURE_WEIGHT = 0.1  # in the loss: nine of ten tokens are texture
WARMUP = 0.1  # share of the updates
TEST_BATCH = 64


class TwoTasks(nn.Module):
    """Model with a linear layer for tokens. (B, 3, H, W) -> (B, classes), (B, H / stride, W / stride, token classes).

    Args:
        model: Any model of this package, with pyramid and classifier.
        level: Of the pyramid, which tells the classes of tokens: 0, 1, 2 for strides 4, 8, 16.
    """

    def __init__(self, model: Any, level: int = 2):
        super().__init__()
        self.model = model
        self.level = level
        self.tokens = nn.Linear(model.pyramid.levels[level].align.out_features, NUM_TOKEN_CLASSES)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, (level,) = self.model.forward_intermediates(images, indices=[self.level], output_fmt='NHWC')
        return self.model.forward_head(x), self.tokens(level)


def normalised(images: torch.Tensor, model: Any) -> torch.Tensor:
    """uint8 to what the model takes."""
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).reshape(3, 1, 1) for key in ('mean', 'std'))
    return (images / 255 - mean) / std


def batches(data: Canvases, num: int, batch_size: int, seed: int) -> Iterator[Canvases]:
    """`num` random batches."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(data.labels), generator=generator)
                       for _ in range(1 + num * batch_size // len(data.labels))])
    for indices in order[:num * batch_size].split(batch_size):
        yield Canvases(*(part[indices] for part in data))


def schedule(optimizer: torch.optim.Optimizer, num_updates: int, lr: float) -> CosineLRScheduler:
    """Warm-up, then a cosine, per update."""
    return CosineLRScheduler(
        optimizer, num_updates, lr_min=lr / 100, warmup_t=int(WARMUP * num_updates), warmup_lr_init=lr / 100,
        warmup_prefix=False, t_in_epochs=False)


def train(network: TwoTasks, data: Canvases, num_updates: int, batch_size: int, lr: float, seed: int) -> None:
    """Train both tasks with AdamW."""
    random_seed(seed)
    optimizer = create_optimizer_v2(network, opt='adamw', lr=lr, weight_decay=0.05)
    scheduler = schedule(optimizer, num_updates, lr)
    weight = torch.tensor(NUM_TEXTURES * [TEXTURE_WEIGHT] + NUM_CLASSES * [1.])
    network.train()
    for i, batch in enumerate(batches(data, num_updates, batch_size, seed)):
        scheduler.step_update(i)
        logits, token_logits = network(normalised(batch.images, network.model))
        loss = F.cross_entropy(logits, batch.labels)
        loss = loss + F.cross_entropy(token_logits.flatten(0, 2), batch.token_labels.flatten(), weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.inference_mode()
def test(network: Any, data: Canvases) -> dict[str, float]:
    """Accuracy of both tasks, in percent.

    Returns:
        top1: Canvases whose digit is right.
        miou: Intersection over union of tokens, mean over the textures and digits that occur.
    """
    network.eval()
    random_seed(0)
    right, counts = 0, torch.zeros(NUM_TOKEN_CLASSES ** 2)
    for images, labels, token_labels in zip(*(part.split(TEST_BATCH) for part in data)):
        logits, token_logits = network(normalised(images, network.model))
        right += int((logits.argmax(dim=1) == labels).sum())
        pairs = token_labels * NUM_TOKEN_CLASSES + token_logits.argmax(dim=3)
        counts += torch.bincount(pairs.flatten(), minlength=len(counts))
    counts = counts.reshape(NUM_TOKEN_CLASSES, NUM_TOKEN_CLASSES)
    overlap = counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())
    return {'top1': 100 * right / len(data.labels), 'miou': 100 * overlap.nanmean().item()}


def mean(rows: Sequence[dict[str, Any]], value: str, **which: Any) -> float | None:
    """Mean of a value over the rows that have these other values, None if there are none."""
    values = [row[value] for row in rows if all(row[key] == wanted for key, wanted in which.items())]
    return statistics.fmean(values) if values else None


def percent(value: float | None) -> str:
    return '' if value is None else f'{value:.2f}'

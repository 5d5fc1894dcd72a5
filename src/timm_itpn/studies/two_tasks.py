"""A model that tells the digit of a canvas, and for each token of it what it shows; how it is trained and tested."""
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import random_seed
from torch.utils.data import BatchSampler, RandomSampler
from torchvision.transforms import functional as TF

from .canvases import NUM_CLASSES, NUM_TEXTURES, Canvases

State = dict[str, torch.Tensor]

_NUM_TOKEN_CLASSES = NUM_TEXTURES + NUM_CLASSES
_TEXTURE_WEIGHT = 0.1  # in the loss: nine of ten tokens are texture
_WARMUP = 0.1  # share of the updates
_TEST_BATCH = 64


class Training(NamedTuple):
    """Length, batch size and peak learning rate of a training."""
    updates: int
    batch: int
    lr: float


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
        self.tokens = nn.Linear(model.pyramid.levels[level].align.out_features, _NUM_TOKEN_CLASSES)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, (level,) = self.model.forward_intermediates(images, indices=[self.level], output_fmt='NHWC')
        return self.model.forward_head(x), self.tokens(level)


def normalised(images: torch.Tensor, model: Any) -> torch.Tensor:
    """uint8 to what the model takes, where the model is."""
    device = next(model.parameters()).device
    return TF.normalize(images.to(device) / 255, list(model.pretrained_cfg['mean']), list(model.pretrained_cfg['std']))


def fit(
        module: nn.Module,
        loss_of: Callable[[Canvases], torch.Tensor],
        data: Canvases,
        training: Training,
        seed: int,
        after_update: Callable[[float], None] = lambda progress: None,
        max_norm: float = math.inf,
        **options: Any,
) -> None:
    """Train with AdamW, warm-up and a cosine.

    Args:
        module: What is trained.
        loss_of: Loss of a batch, which is on the module's device.
        data: What random batches are taken from, all of it before one repeats.
        training: How long.
        seed: Of the order, and of all that is random in the model.
        after_update: Called with the share of all updates that are done.
        max_norm: Of the gradients.
        options: For timm's optimizer factory.
    """
    random_seed(seed)
    optimizer = create_optimizer_v2(module, opt='adamw', lr=training.lr, weight_decay=0.05, **options)
    scheduler = CosineLRScheduler(
        optimizer, training.updates, lr_min=training.lr / 100, warmup_t=int(_WARMUP * training.updates),
        warmup_lr_init=training.lr / 100, warmup_prefix=False, t_in_epochs=False)
    module.train()
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    order = RandomSampler(data.labels, num_samples=training.updates * training.batch, generator=generator)
    for i, indices in enumerate(BatchSampler(order, training.batch, drop_last=False)):
        scheduler.step_update(i)
        optimizer.zero_grad()
        loss_of(Canvases(*(values[indices].to(device) for values in data))).backward()
        nn.utils.clip_grad_norm_(module.parameters(), max_norm)
        optimizer.step()
        after_update((i + 1) / training.updates)


def train(network: TwoTasks, data: Canvases, training: Training, seed: int) -> None:
    """Train both tasks."""
    weight = network.tokens.weight.new_tensor(NUM_TEXTURES * [_TEXTURE_WEIGHT] + NUM_CLASSES * [1.])

    def loss_of(batch: Canvases) -> torch.Tensor:
        logits, token_logits = network(normalised(batch.images, network.model))
        token_loss = F.cross_entropy(token_logits.flatten(0, 2), batch.token_labels.flatten(), weight)
        return F.cross_entropy(logits, batch.labels) + token_loss

    fit(network, loss_of, data, training, seed)


@torch.inference_mode()
def test(network: nn.Module, data: Canvases) -> dict[str, float]:
    """Accuracy of both tasks, in percent: canvases whose digit is right, and overlap of tokens, mean over classes."""
    from sklearn.metrics import jaccard_score

    network.eval()
    random_seed(0)
    outputs = [network(normalised(images, network.model)) for images in data.images.split(_TEST_BATCH)]
    digits, tokens = (torch.cat([logits.argmax(dim=-1).cpu() for logits in batches]) for batches in zip(*outputs))
    right = int((digits == data.labels).sum())
    overlap = jaccard_score(data.token_labels.flatten(), tokens.flatten(), average='macro')
    return {'top-1': 100 * right / len(data.labels), 'mIoU': 100 * overlap}

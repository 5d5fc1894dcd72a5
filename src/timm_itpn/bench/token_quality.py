"""What token gathering and migration cost in accuracy: a small Fast-iTPN on digits that are drawn onto canvases.

One model has two tasks: the digit of a canvas (classifier), and for each token which photograph it is of, or which
digit (a linear layer on the pyramid's level at stride 16). It is trained without acceleration, on small canvases first,
then measured with it, as it is and after fine-tuning with it.
"""
import sys
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import random_seed

from ..tokens.block import MigrationBlock
from ..tokens.migration import replenish
from .canvases import NUM_CLASSES, NUM_TEXTURES, Canvases, draw, load_digits

__all__ = ['FORMS', 'SETTINGS', 'SWEEP', 'Setting', 'study']

Row = Dict[str, Any]

SIDE = 256  # pixels, 16 x 16 tokens
WINDOW = 8
PYRAMID_DIM = 64
SMALL_SIDE = 64
SMALL_UPDATES, SMALL_LR = 3000, 2e-3
UPDATES, LR = 120, 1e-3
TUNING_UPDATES, TUNING_LR = 60, 5e-4
MODEL = dict(
    embed_dim=64, depths=(1, 1, 6), num_heads=2, img_size=SIDE, num_classes=NUM_CLASSES, head_init_scale=1.,
    pyramid=True, pyramid_dim=PYRAMID_DIM)
NUM_TOKEN_CLASSES = NUM_TEXTURES + NUM_CLASSES
BATCH = 32
TEXTURE_WEIGHT = 0.1  # in the loss
WARMUP = 0.1  # share of the updates
TEST_CANVASES, SWEEP_CANVASES = 9, 3  # per digit; fewer for the sweep


class Setting(NamedTuple):
    """A way to run stage 3.

    Attributes:
        name: Its name in the rows.
        kwargs: Arguments of the model.
        change: What is done to the model; the controls are made by it.
    """
    name: str
    kwargs: Dict[str, Any] = {}
    change: Callable[[Any], None] = lambda model: None


class TwoTasks(nn.Module):
    """Model with a linear layer for tokens. (B, 3, H, W) -> (B, classes), (B, H / 16, W / 16, token classes)."""

    def __init__(self, setting: Setting):
        super().__init__()
        self.model: Any = timm.create_model('fast_itpn_tiny', **{**MODEL, **setting.kwargs})
        self.tokens = nn.Linear(PYRAMID_DIM, NUM_TOKEN_CLASSES)
        setting.change(self.model)

    def forward(self, images: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        x, (level,) = self.model.forward_intermediates(images, indices=[2], output_fmt='NHWC')
        return self.model.forward_head(x), self.tokens(level)


def compare_by(features: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    """Change what tokens are compared by."""
    def change(model: Any) -> None:
        for block in model.stages[2].blocks:
            block.features = features
    return change


def at_random(x: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
    return torch.randn_like(x)


def leave_empty(model: Any) -> None:
    """Do not replenish: where a token left, there is zero."""
    def without(tokens: List[torch.Tensor], places: List[torch.Tensor], num_tokens: int) -> torch.Tensor:
        return replenish([torch.zeros_like(x) for x in tokens[:-1]] + tokens[-1:], places, num_tokens)

    model.stages[2].replenish = without


def do_not_gather(model: Any) -> None:
    """Let windows see nothing of each other."""
    def nowhere(num_tokens: torch.Tensor) -> torch.Tensor:
        return torch.full((len(num_tokens), len(num_tokens)), float('-inf'))

    model.stages[2].gathering_bias = nowhere


def attend_in_two_steps(model: Any) -> None:
    """Attention of gathering token and tokens in each window, then of all to all gathering tokens, as the authors draw.

    Both steps are by the projections of the block.
    """
    def mix(
            block: MigrationBlock,
            x: torch.Tensor,
            places: torch.Tensor,
            gathering: torch.Tensor,
            *sizes: Any,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        if not block.windowed:
            return MigrationBlock.mix(block, x, places, gathering, *sizes)
        qkv = block.project(x)
        q, k, v = qkv.flatten(0, 1).permute(2, 0, 3, 1, 4)
        x = block.attend(x, q, k, v, None)
        q, k, v = block.project(x).flatten(1, 2).permute(2, 0, 3, 1, 4)
        length = x.shape[2]
        return block.attend(x, q, k[:, :, ::length], v[:, :, ::length], None), qkv

    for block in model.stages[2].blocks:
        block.mix = partial(mix, block)


LIGHT: Dict[str, Any] = dict(acceleration='light', gather_window=WINDOW)
FULL: Dict[str, Any] = dict(acceleration='full', gather_window=WINDOW)
WINDOWS: Dict[str, Any] = dict(gather_window=WINDOW)
TOKENS: Dict[str, Any] = dict(gather_window=WINDOW, gather_form='token')

SETTINGS = (  # measured as they are and after fine-tuning, with every seed
    Setting('off'),
    Setting('light', LIGHT),
    Setting('full', FULL),
    Setting('full, random tokens leave', FULL, compare_by(at_random)),
    Setting('full, without replenishing', FULL, leave_empty),
)
FORMS = (  # likewise, with the first seed
    Setting('windows in all blocks', WINDOWS),
    Setting('windows in all blocks, no gathering', WINDOWS, do_not_gather),
    Setting('windows in all blocks, form token', TOKENS),
    Setting('windows in all blocks, form token in two steps', TOKENS, attend_in_two_steps),
)
SWEEP = (  # as they are, with the first seed
    *(Setting(f'windows of {window} in the first {blocks} blocks',
              dict(gather_window=window, gather_blocks=range(blocks)))
      for window in (8, 4) for blocks in (2, 3, 4, 5)),
    *(Setting(f'{1 - 2 * share:.0%} stay (windows of {window})',
              dict(gather_window=window, gather_blocks=[], migrate={0: share, 2: share}))
      for window in (16, 8, 4) for share in (0.125, 0.1875, 0.25, 0.3) if window > 4 or share < 0.3),
    Setting('full, compared by queries', FULL, compare_by(lambda x, qkv: qkv[:, :, :, 0].flatten(-2))),
    Setting('full, compared by values', FULL, compare_by(lambda x, qkv: qkv[:, :, :, 2].flatten(-2))),
    Setting('full, compared by tokens', FULL, compare_by(lambda x, qkv: x)),
    Setting('full, compared by keys, mean over heads', FULL, compare_by(lambda x, qkv: qkv[:, :, :, 1].mean(dim=3))),
)


def normalised(images: torch.Tensor, model: Any) -> torch.Tensor:
    """uint8 to what the model takes."""
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).reshape(3, 1, 1) for key in ('mean', 'std'))
    return (images / 255 - mean) / std


def batches(data: Canvases, num: int, seed: int) -> Iterator[Canvases]:
    """`num` random batches."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(data.labels), generator=generator)
                       for _ in range(1 + num * BATCH // len(data.labels))])
    for i in range(num):
        indices = order[i * BATCH:(i + 1) * BATCH]
        yield Canvases(*(part[indices] for part in data))


def train(network: TwoTasks, data: Canvases, num_updates: int, lr: float, seed: int) -> None:
    """Train both tasks with AdamW and a cosine schedule."""
    random_seed(seed)
    optimizer = create_optimizer_v2(network, opt='adamw', lr=lr, weight_decay=0.05)
    scheduler = CosineLRScheduler(
        optimizer, num_updates, lr_min=lr / 100, warmup_t=int(WARMUP * num_updates), warmup_lr_init=lr / 100,
        warmup_prefix=False, t_in_epochs=False)
    weight = torch.tensor(NUM_TEXTURES * [TEXTURE_WEIGHT] + NUM_CLASSES * [1.])  # nine of ten tokens are texture
    network.train()
    for i, batch in enumerate(batches(data, num_updates, seed)):
        scheduler.step_update(i)
        logits, token_logits = network(normalised(batch.images, network.model))
        loss = F.cross_entropy(logits, batch.labels)
        loss = loss + F.cross_entropy(token_logits.flatten(0, 2), batch.token_labels.flatten(), weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.inference_mode()
def test(network: Any, data: Canvases) -> Dict[str, float]:
    """Accuracy of both tasks, in percent.

    Returns:
        top1: Canvases whose digit is right.
        miou: Intersection over union of tokens, mean over the textures and digits that occur.
    """
    network.eval()
    random_seed(0)
    right, counts = 0, torch.zeros(NUM_TOKEN_CLASSES ** 2)
    for images, labels, token_labels in zip(*(part.split(2 * BATCH) for part in data)):
        logits, token_logits = network(normalised(images, network.model))
        right += int((logits.argmax(dim=1) == labels).sum())
        pairs = token_labels * NUM_TOKEN_CLASSES + token_logits.argmax(dim=3)
        counts += torch.bincount(pairs.flatten(), minlength=len(counts))
    counts = counts.reshape(NUM_TOKEN_CLASSES, NUM_TOKEN_CLASSES)
    overlap = counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())
    return {'top1': 100 * right / len(data.labels), 'miou': 100 * overlap.nanmean().item()}


def study(seeds: Sequence[int]) -> Iterator[Row]:
    """Train, measure, fine-tune and measure again.

    Args:
        seeds: Of weights and order; the data are the same for all.

    Yields:
        A row for each setting, as it is and fine-tuned.
    """
    train_digits, test_digits = load_digits(test=False), load_digits(test=True)
    small = draw(*train_digits, num=6 * len(train_digits[1]), side=SMALL_SIDE, copies=1, seed=0)
    train_set = draw(*train_digits, num=3 * len(train_digits[1]), side=SIDE, copies=3, seed=1)
    # on those of seed 2 light and full were chosen
    test_set = draw(*test_digits, num=TEST_CANVASES * len(test_digits[1]), side=SIDE, copies=3, seed=4)
    sweep_set = Canvases(*(part[:SWEEP_CANVASES * len(test_digits[1])] for part in test_set))
    for number, seed in enumerate(seeds):
        state = train_off(small, train_set, seed)
        tuned = SETTINGS if number else (*SETTINGS, *FORMS)
        for setting in tuned if number else (*tuned, *SWEEP):
            data = sweep_set if setting in SWEEP else test_set
            yield measured(setting, False, seed, build(setting, state), data)
        for setting in tuned:
            network = build(setting, state)
            train(network, train_set, TUNING_UPDATES, TUNING_LR, seed)
            yield measured(setting, True, seed, network, test_set)


def train_off(small: Canvases, train_set: Canvases, seed: int) -> Dict[str, torch.Tensor]:
    """State of a network that is trained without acceleration, on small canvases first."""
    random_seed(seed)
    network = TwoTasks(SETTINGS[0])
    network.model.set_input_size(SMALL_SIDE)
    train(network, small, SMALL_UPDATES, SMALL_LR, seed)
    network.model.set_input_size(SIDE)
    train(network, train_set, UPDATES, LR, seed)
    return network.state_dict()


def build(setting: Setting, state: Dict[str, torch.Tensor]) -> TwoTasks:
    network = TwoTasks(setting)
    network.load_state_dict(state)
    return network


def measured(setting: Setting, tuned: bool, seed: int, network: TwoTasks, test_set: Canvases) -> Row:
    row = {'setting': setting.name, 'tuned': tuned, 'seed': seed, **test(network, test_set)}
    print(row, file=sys.stderr, flush=True)
    return row

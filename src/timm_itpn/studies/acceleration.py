"""What token gathering and migration cost in accuracy: a small Fast-iTPN on digits that are drawn onto canvases.

It is trained without acceleration, on small canvases first, then measured with it, as it is and after fine-tuning.
"""
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from timm.utils import random_seed

from ..acceleration.block import MigrationBlock
from ..acceleration.migration import replenish
from ..bench.rows import lines_as_markdown
from .canvases import NUM_CLASSES, Canvases, draw, load_digits
from .two_tasks import TwoTasks, mean, percent, test, train

__all__ = ['FORMS', 'SETTINGS', 'SWEEP', 'Setting', 'build', 'markdown_table', 'study']

Row = dict[str, Any]

HEADER = (
    'setting', 'top-1 as it is', 'mIoU as it is', 'top-1 tuned', 'against off', 'mIoU tuned', 'against off', 'seeds')
OFF = 'off'  # what the others are compared with

SIDE = 256  # pixels, 16 x 16 tokens
WINDOW = 8
SMALL_SIDE = 64
SMALL_UPDATES, SMALL_LR = 3000, 2e-3
UPDATES, LR = 120, 1e-3
TUNING_UPDATES, TUNING_LR = 60, 5e-4
MODEL = dict(
    embed_dim=64, depths=(1, 1, 6), num_heads=2, img_size=SIDE, num_classes=NUM_CLASSES, head_init_scale=1.,
    pyramid=True, pyramid_dim=64)
BATCH = 32
TEST_CANVASES, SWEEP_CANVASES = 9, 3  # per digit; fewer for the sweep


class Setting(NamedTuple):
    """A way to run stage 3.

    Attributes:
        name: Its name in the rows.
        kwargs: Arguments of the model.
        change: What is done to the model; the controls are made by it.
    """
    name: str
    kwargs: dict[str, Any] = {}
    change: Callable[[Any], None] = lambda model: None


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
    def without(tokens: list[torch.Tensor], places: list[torch.Tensor], num_tokens: int) -> torch.Tensor:
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
    ) -> tuple[torch.Tensor, torch.Tensor]:
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


LIGHT: dict[str, Any] = dict(acceleration='light', gather_window=WINDOW)
FULL: dict[str, Any] = dict(acceleration='full', gather_window=WINDOW)
WINDOWS: dict[str, Any] = dict(gather_window=WINDOW)
TOKENS: dict[str, Any] = dict(gather_window=WINDOW, gather_form='token')

SETTINGS = (  # measured as they are and after fine-tuning, with every seed
    Setting(OFF),
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
            train(network, train_set, TUNING_UPDATES, BATCH, TUNING_LR, seed)
            yield measured(setting, True, seed, network, test_set)


def train_off(small: Canvases, train_set: Canvases, seed: int) -> dict[str, torch.Tensor]:
    """State of a network that is trained without acceleration, on small canvases first."""
    random_seed(seed)
    network = create(SETTINGS[0])
    network.model.set_input_size(SMALL_SIDE)
    train(network, small, SMALL_UPDATES, BATCH, SMALL_LR, seed)
    network.model.set_input_size(SIDE)
    train(network, train_set, UPDATES, BATCH, LR, seed)
    return network.state_dict()


def create(setting: Setting) -> TwoTasks:
    model = timm.create_model('fast_itpn_tiny', **{**MODEL, **setting.kwargs})
    setting.change(model)
    return TwoTasks(model)


def build(setting: Setting, state: dict[str, torch.Tensor]) -> TwoTasks:
    network = create(setting)
    network.load_state_dict(state)
    return network


def measured(setting: Setting, tuned: bool, seed: int, network: TwoTasks, test_set: Canvases) -> Row:
    row = {'setting': setting.name, 'tuned': tuned, 'seed': seed, **test(network, test_set)}
    print(row, file=sys.stderr, flush=True)
    return row


def markdown_table(rows: Sequence[Row]) -> str:
    """Means over seeds in percent, one line per setting in the order of the rows."""
    lines = []
    for name in dict.fromkeys(row['setting'] for row in rows):
        of_name = [row for row in rows if row['setting'] == name]
        seeds = {row['seed'] for row in of_name}
        off = [row for row in rows if row['setting'] == OFF and row['seed'] in seeds]
        texts = [name, *(percent(mean(of_name, value, tuned=False)) for value in ('top1', 'miou'))]
        for value in ('top1', 'miou'):
            here, there = (mean(group, value, tuned=True) for group in (of_name, off))
            texts += [percent(here), '' if here is None or there is None or name == OFF else f'{here - there:+.2f}']
        lines.append((*texts, str(len(seeds))))
    return lines_as_markdown(HEADER, lines)

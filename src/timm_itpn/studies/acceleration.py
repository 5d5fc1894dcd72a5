"""What token gathering and migration cost in accuracy, and what they gain in speed.

A small Fast-iTPN is trained on digits that are drawn onto canvases, without acceleration, on small canvases first. Then
it is measured with it, as it is and after fine-tuning. Times are those of a base model.
"""
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import timm
import torch
from timm.utils import random_seed

from .. import acceleration
from ..acceleration.block import MigrationBlock
from ..acceleration.migration import similarity
from ..acceleration.stage import MigrationStage
from ..bench.machine import this_machine
from ..bench.timing import alternate, median_ratio, wall_time
from ..models import itpn
from .canvases import NUM_CLASSES, Canvases, draw, load_digits
from .results import Key, Row, measure
from .two_tasks import State, Training, TwoTasks, test, train

__all__ = ['ARMS', 'study']

_SIDE = 256  # pixels, 16 x 16 tokens
_WINDOW = 8
_SMALL_SIDE = 64
_SMALL_TRAINING = Training(3000, 32, 2e-3)
_TRAINING = Training(120, 32, 1e-3)
_TUNING = Training(60, 32, 5e-4)
_MODEL: dict[str, Any] = dict(
    model_name='fast_itpn_tiny', depths=(1, 1, 6), embed_dim=64, num_heads=2, img_size=_SIDE, num_classes=NUM_CLASSES,
    head_init_scale=1., pyramid_dim=64)
_TEST_CANVASES = 9  # per digit
_TIMED: dict[str, Any] = dict(model_name='fast_itpn_base', depths=(3, 3, 24), window=16, img_size=1024)
_ROUNDS = 3


class _RandomTokensLeave(MigrationBlock):
    def forward(self, *args: Any) -> Any:
        with mock.patch.object(
                acceleration.block, 'similarity', lambda keys, real: similarity(torch.randn_like(keys), real)):
            return super().forward(*args)


class _NotReplenished(MigrationStage):
    """Where a token left, there is zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, left = self.run(x)
        kept = torch.ones_like(x).flatten(1, 2)
        for group in filter(None, left):
            kept = kept.scatter(1, group.positions.flatten(1)[:, :, None].expand(-1, -1, kept.shape[2]), 0.)
        return x * kept.reshape(x.shape)


class _Setting(NamedTuple):
    """A way to run stage 3."""
    name: str | None = None  # of the acceleration
    carry: bool = True
    leave: dict[float, float] | None = None  # share of the depth -> share of the tokens; None: as named
    stage: type[MigrationStage] = MigrationStage
    block: type[MigrationBlock] = MigrationBlock

    def create(self, window: int, depths: tuple[int, int, int], **kwargs: Any) -> Any:
        """A model with pyramid."""
        if self.name is not None:
            kwargs.update(acceleration=self.name, gather_window=window, carry=self.carry)
        if self.leave is not None:
            kwargs['migrate'] = {int(where * depths[2]): share for where, share in self.leave.items()}
        with mock.patch.object(itpn, 'MigrationStage', self.stage), \
                mock.patch.object(acceleration.stage, 'MigrationBlock', self.block):
            return timm.create_model(depths=depths, pyramid=True, **kwargs)


# with every seed
_SETTINGS = {
    'off': _Setting(),
    'light': _Setting('light'),
    'light, stored': _Setting('light', carry=False),
    'full': _Setting('full'),
    'full, stored': _Setting('full', carry=False),
    'full, random tokens leave': _Setting('full', block=_RandomTokensLeave),
    'full, not replenished': _Setting('full', stage=_NotReplenished),
}
_SWEEP: dict[str, _Setting] = {}  # with the first seed
ARMS = (*_SETTINGS, *_SWEEP)


def study(seeds: Sequence[int], done: Collection[Key] = ()) -> Iterator[Row]:
    """Train, measure, fine-tune and measure again; then time all settings.

    Args:
        seeds: Of weights and order; the data are the same for all.
        done: Rows that are not wanted.

    Yields:
        A row for each setting, as it is, fine-tuned, and of its speed.
    """
    train_digits, test_digits = load_digits(test=False), load_digits(test=True)
    small = draw(*train_digits, num=6 * len(train_digits[1]), side=_SMALL_SIDE, copies=1, seed=0)
    train_set = draw(*train_digits, num=3 * len(train_digits[1]), side=_SIDE, copies=3, seed=1)
    # on those of seed 2 the settings were chosen
    test_set = draw(*test_digits, num=_TEST_CANVASES * len(test_digits[1]), side=_SIDE, copies=3, seed=4)
    for number, seed in enumerate(seeds):
        settings = _SETTINGS if number else {**_SETTINGS, **_SWEEP}
        yield from measure(
            {(arm, kind, seed): setting for kind in ('as it is', 'tuned') for arm, setting in settings.items()}, done,
            partial(_train_off, small, train_set, seed), _network,
            partial(train, data=train_set, training=_TUNING, seed=seed), partial(test, data=test_set))
    wanted = [arm for arm in ARMS if (arm, '1024 px', seeds[0]) not in done]
    for arm, speed in _speeds([ARMS[0], *wanted]).items() if wanted else ():
        if arm in wanted:
            yield Row(arm, '1024 px', seeds[0], {'speed': speed}, this_machine('cpu'))


def _train_off(small: Canvases, train_set: Canvases, seed: int) -> State:
    """State of a network that is trained without acceleration, on small canvases first."""
    random_seed(seed)
    network = _network(_Setting())
    network.model.set_input_size(_SMALL_SIDE)
    train(network, small, _SMALL_TRAINING, seed)
    network.model.set_input_size(_SIDE)
    train(network, train_set, _TRAINING, seed)
    return network.state_dict()


def _network(setting: _Setting, state: State | None = None) -> TwoTasks:
    network = TwoTasks(setting.create(window=_WINDOW, **_MODEL))
    if state is not None:
        network.load_state_dict(state)
    return network


@torch.inference_mode()
def _speeds(arms: Sequence[str]) -> dict[str, float]:
    """How many times as fast as the first of them arms are, with the depth and the windows of a base model."""
    images = torch.randn(1, 3, _TIMED['img_size'], _TIMED['img_size'])
    calls, state = {}, _Setting().create(**_TIMED).state_dict()
    for arm in arms:
        model = {**_SETTINGS, **_SWEEP}[arm].create(**_TIMED, device='meta').eval()
        model.load_state_dict(state, assign=True)  # they share it
        calls[arm] = partial(model.forward_intermediates, images, intermediates_only=True)
    times_ms = alternate(calls, _ROUNDS, 1, wall_time)
    return {arm: median_ratio(times_ms[arms[0]], values) for arm, values in times_ms.items()}

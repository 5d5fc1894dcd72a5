"""What token gathering and migration cost in accuracy: a small Fast-iTPN on digits that are drawn onto canvases.

It is trained without acceleration, on small canvases first, then measured with it, as it is and after fine-tuning.
"""
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import timm
import torch
from timm.utils import random_seed

from ..acceleration import migration
from ..acceleration.stage import MigrationStage
from ..models import itpn
from .canvases import NUM_CLASSES, draw, load_digits
from .results import Measurement, as_it_is_and_tuned
from .two_tasks import State, Training, TwoTasks, test, train

_SIDE = 256  # pixels, 16 x 16 tokens
_WINDOW = 8
_SMALL_SIDE = 64
_SMALL_TRAINING = Training(3000, 32, 2e-3)
_TRAINING = Training(120, 32, 1e-3)
_TUNING = Training(60, 32, 5e-4)
_MODEL: dict[str, Any] = dict(
    embed_dim=64, depths=(1, 1, 6), num_heads=2, img_size=_SIDE, num_classes=NUM_CLASSES, head_init_scale=1.,
    pyramid=True, pyramid_dim=64)
_TEST_CANVASES = 9  # per digit


class _RandomTokensLeave(MigrationStage):
    def run(self, x: torch.Tensor) -> Any:
        similarity = migration.similarity
        with mock.patch.object(migration, 'similarity', lambda keys, real: similarity(torch.randn_like(keys), real)):
            return super().run(x)


class _NotReplenished(MigrationStage):
    """Where a token left, there is zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, left = self.run(x)
        kept = torch.ones_like(x).flatten(1, 2)
        for group in filter(None, left):
            kept = kept.scatter(1, group.positions.flatten(1)[:, :, None].expand(-1, -1, kept.shape[2]), 0.)
        return x * kept.reshape(x.shape)


SETTINGS: dict[str, dict[str, Any]] = {  # arguments of the model
    'off': {},
    'light': dict(acceleration='light'),
    'light, stored': dict(acceleration='light', carry=False),
    'full': dict(acceleration='full'),
    'full, stored': dict(acceleration='full', carry=False),
}
_CONTROLS = {'full, random tokens leave': _RandomTokensLeave, 'full, not replenished': _NotReplenished}
ARMS = (*SETTINGS, *_CONTROLS)


def study_seed(seed: int, device: str) -> Iterator[Measurement]:
    """Train, measure, fine-tune and measure again, with each setting."""
    train_digits, test_digits = load_digits(test=False), load_digits(test=True)
    train_set = draw(*train_digits, num=3 * len(train_digits[1]), side=_SIDE, copies=3, seed=1)
    # on those of seed 2 the settings were chosen
    test_set = draw(*test_digits, num=_TEST_CANVASES * len(test_digits[1]), side=_SIDE, copies=3, seed=4)

    random_seed(seed)
    network = _network('off', device)
    network.model.set_input_size(_SMALL_SIDE)
    small = draw(*train_digits, num=6 * len(train_digits[1]), side=_SMALL_SIDE, copies=1, seed=0)
    train(network, small, _SMALL_TRAINING, seed)
    network.model.set_input_size(_SIDE)
    train(network, train_set, _TRAINING, seed)
    yield from as_it_is_and_tuned(
        ARMS, partial(_network, device=device, state=network.state_dict()),
        tune=partial(train, data=train_set, training=_TUNING, seed=seed), test=partial(test, data=test_set))


def _network(arm: str, device: str, state: State | None = None) -> TwoTasks:
    kwargs = dict(SETTINGS.get(arm, SETTINGS['full']), **_MODEL)
    if arm != 'off':
        kwargs['gather_window'] = _WINDOW
    with mock.patch.object(itpn, 'MigrationStage', _CONTROLS.get(arm, MigrationStage)):
        network = TwoTasks(timm.create_model('fast_itpn_tiny', **kwargs))
    if state is not None:
        network.load_state_dict(state)
    return network.to(device)

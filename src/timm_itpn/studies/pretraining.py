"""What pre-training gives: a small Fast-iTPN learns from digits without labels, then two tasks from few labels.

The tasks are the digit, by the classifier, and the digit at each position of the pyramid's finest level. All networks
see the same labels in the same order; only their weights at the start differ.
"""
from collections.abc import Iterator
from typing import Any, NamedTuple

import timm
import torch
import torch.nn as nn
from timm.layers import LayerNorm
from timm.utils import random_seed

from ..models import ITPN
from ..pretrain.data import random_masking
from ..pretrain.objectives import create_student, initialise
from ..pretrain.pixel import Mfm, Pixel
from .canvases import NUM_CLASSES, Canvases, draw, load_digits
from .results import Measurement
from .two_tasks import State, Training, TwoTasks, fit, normalised, test, train

_MODEL: dict[str, Any] = dict(embed_dim=64, depths=(1, 1, 6), num_heads=2, pyramid_dim=64)
_DECODER: dict[str, Any] = dict(decoder_dim=64, decoder_depth=2, decoder_num_heads=2)
_SIDE = 64  # pixels, 4 x 4 tokens
_CANVAS: dict[str, Any] = dict(side=_SIDE, copies=1, sizes=(56, 65), stride=4, plain=True)
_NUM_MASKED = 8  # of 16 tokens; of those of a photograph the paper hides 0.75
_PRETRAINING = Training(1500, 64, 2e-3)
_TUNING = Training(300, 32, 1e-3)
_LABELS = (10, 50)  # per class
_DRAWINGS = 4  # of each digit without label
_TEST_DRAWINGS = 3


class PixelOfStage3(Pixel):
    """`Pixel` whose decoder sees stage 3 and not the pyramid, which is then not trained; to compare with."""

    def __init__(self, student: ITPN, num_masked: int, **kwargs: Any):
        super().__init__(student, num_masked, **kwargs)
        self.backbone.pyramid.requires_grad_(False)
        dim = student.embed_dim
        self.decoder_embed = nn.Sequential(LayerNorm(dim), nn.Linear(dim, _DECODER['decoder_dim']))

    def encode(self, images: torch.Tensor, visible: torch.Tensor) -> list[torch.Tensor]:
        return [self.decoder_embed(self.visible_maps(images, visible)[2][:, 0])]


class Start(NamedTuple):
    """Where fine-tuning starts."""
    objective: type[Pixel] | None = None  # of pre-training
    new_pyramid: bool = False  # the pyramid does not get the trained weights


STARTS = {
    'scratch': Start(),
    'pixel': Start(Pixel),
    'pixel, new pyramid': Start(Pixel, new_pyramid=True),
    'pixel without pyramid, new pyramid': Start(PixelOfStage3, new_pyramid=True),
    'mfm': Start(Mfm),
    'mfm, new pyramid': Start(Mfm, new_pyramid=True),
}
ARMS = tuple(STARTS)


def study_seed(seed: int, device: str) -> Iterator[Measurement]:
    """Pre-train, fine-tune with few labels, and measure; from each start, with each number of labels."""
    digits, labels = load_digits(test=False)
    unlabelled = draw(digits, labels, num=_DRAWINGS * len(labels), seed=1, **_CANVAS)
    test_digits, test_labels = load_digits(test=True)
    test_set = draw(test_digits, test_labels, num=_TEST_DRAWINGS * len(test_labels), seed=4, **_CANVAS)
    train_sets = {}
    for num in _LABELS:  # the first digits of each class
        indices = torch.cat([(labels == label).nonzero()[:num, 0] for label in range(NUM_CLASSES)])
        train_sets[num] = draw(digits[indices], labels[indices], num=len(indices), seed=7, **_CANVAS)
    states: dict[type[Pixel] | None, State] = {None: {}}  # starts share what is pre-trained alike
    for arm, start in STARTS.items():
        if start.objective is not None and start.objective not in states:
            states[start.objective] = pretrain(start.objective, unlabelled, _PRETRAINING, seed, device)
        for num, train_set in train_sets.items():
            network = _network(start, states[start.objective], seed).to(device)
            train(network, train_set, _TUNING, seed)
            yield arm, f'{num} labels', test(network, test_set)


def pretrain(
        objective_type: type[Pixel],
        data: Canvases,
        training: Training,
        seed: int,
        device: str,
        num_masked: int = _NUM_MASKED,
        model: dict[str, Any] = _MODEL,
        decoder: dict[str, Any] = _DECODER,
) -> State:
    """State of a student after pre-training, backbone and pyramid."""
    random_seed(seed)
    student = create_student('fast_itpn_tiny', objective_type.NAME, data.images.shape[3], **model)
    initialise(student)
    objective = objective_type(student, num_masked, **decoder).to(device)
    generator = torch.Generator().manual_seed(seed)

    def loss_of(batch: Canvases) -> torch.Tensor:
        masked = torch.stack([random_masking(objective.grid_size, num_masked, generator) for _ in batch.labels])
        return objective(normalised(batch.images, student), masked.to(device))['loss']

    fit(objective, loss_of, data, training, seed, objective.after_update, max_norm=3., betas=(0.9, 0.95))
    return student.state_dict()


def _network(start: Start, state: State, seed: int) -> TwoTasks:
    """A network with the weights of `state`; all others, and for scratch all, are new."""
    random_seed(seed)
    model = timm.create_model(
        'fast_itpn_tiny', **_MODEL, img_size=_SIDE, num_classes=NUM_CLASSES, head_init_scale=1., pyramid=True)
    new = ('head.', 'pyramid.') if start.new_pyramid else ('head.',)
    kept = {key: value for key, value in state.items() if not key.startswith(new)}
    model.load_state_dict({**model.state_dict(), **kept})
    return TwoTasks(model, level=0)

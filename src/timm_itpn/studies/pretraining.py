"""What pre-training gives: a small Fast-iTPN learns from digits without labels, then two tasks from few labels.

The tasks are the digit, by the classifier, and the digit at each position of the pyramid's finest level. All networks
see the same labels in the same order; only their weights at the start differ.
"""
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import dispatch_clip_grad, random_seed

from ..bench.processes import in_processes
from ..bench.rows import lines_as_markdown
from ..pretrain.masking import random_masking
from ..pretrain.objectives import create_objective, create_student
from .canvases import NUM_CLASSES, Canvases, draw, load_digits
from .two_tasks import TwoTasks, batches, mean, normalised, percent, schedule, test, train

__all__ = ['LABELS', 'STARTS', 'Start', 'markdown_table', 'study']

Row = dict[str, Any]
StateDict = dict[str, torch.Tensor]

MODEL_NAME = 'fast_itpn_tiny'
MODEL: dict[str, Any] = dict(embed_dim=64, depths=(1, 1, 6), num_heads=2, pyramid_dim=64)
DECODER = dict(decoder_dim=64, decoder_depth=2, decoder_num_heads=2)
SIDE = 64  # pixels, 4 x 4 tokens
CANVAS: dict[str, Any] = dict(side=SIDE, copies=1, sizes=(56, 65), stride=4, plain=True)
MASK_RATIO = 0.5  # of 16 tokens; of those of a photograph the paper hides 0.75
UPDATES, BATCH, LR = 1500, 64, 2e-3
TUNING_UPDATES, TUNING_BATCH, TUNING_LR = 300, 32, 1e-3
LABELS = (10, 50)  # per class
MAX_NORM = 3.  # of gradients in pre-training
DRAWINGS = 4  # of each digit without label
TEST_DRAWINGS = 3


class Start(NamedTuple):
    """Where fine-tuning starts.

    Attributes:
        name: Its name in the rows.
        objective: Key of `pretrain.objectives.OBJECTIVES`, None for no pre-training.
        kwargs: Arguments of the objective.
        new_pyramid: The pyramid does not get the trained weights.
    """
    name: str
    objective: str | None = None
    kwargs: dict[str, Any] = {}
    new_pyramid: bool = False


STARTS = (
    Start('scratch'),
    Start('pixel', 'pixel'),
    Start('pixel, new pyramid', 'pixel', new_pyramid=True),
    Start('pixel without pyramid, new pyramid', 'pixel', dict(pyramid=False), new_pyramid=True),
    Start('mfm', 'mfm'),
    Start('mfm, new pyramid', 'mfm', new_pyramid=True),
)


def study(seeds: Sequence[int]) -> Iterator[Row]:
    """Pre-train, fine-tune with few labels, and measure; as many seeds at a time as there are cores.

    Args:
        seeds: Of weights, order and masks; the data are the same for all.

    Yields:
        A row for each seed, start and number of labels.
    """
    for rows in in_processes(study_seed, seeds, processes=min(len(seeds), os.cpu_count() or 1), threads=1):
        yield from rows


def study_seed(seed: int) -> list[Row]:
    """The rows of one seed."""
    digits, labels = load_digits(test=False)
    unlabelled = draw(digits, labels, num=DRAWINGS * len(labels), seed=1, **CANVAS)
    test_digits, test_labels = load_digits(test=True)
    test_set = draw(test_digits, test_labels, num=TEST_DRAWINGS * len(test_labels), seed=4, **CANVAS)
    train_sets = {num: labelled(digits, labels, num) for num in LABELS}
    states: dict[str, StateDict] = {}
    rows: list[Row] = []
    for start in STARTS:
        way = f'{start.objective} {start.kwargs}'  # starts share what is pre-trained alike
        if start.objective and way not in states:
            states[way] = pretrain(start, unlabelled, seed)
        for num, train_set in train_sets.items():
            network = build(start, states.get(way, {}), seed)
            train(network, train_set, TUNING_UPDATES, TUNING_BATCH, TUNING_LR, seed)
            rows.append({'start': start.name, 'labels': num, 'seed': seed, **test(network, test_set)})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def labelled(digits: torch.Tensor, labels: torch.Tensor, num: int) -> Canvases:
    """A canvas of each of the first `num` digits of each class."""
    indices = torch.cat([(labels == label).nonzero()[:num, 0] for label in range(NUM_CLASSES)])
    return draw(digits[indices], labels[indices], num=len(indices), seed=7, **CANVAS)


def pretrain(start: Start, data: Canvases, seed: int) -> StateDict:
    """State of a student after pre-training, backbone and pyramid."""
    random_seed(seed)
    objective_name = str(start.objective)
    student = create_student(MODEL_NAME, objective_name, SIDE, **MODEL)
    objective = create_objective(objective_name, student, MASK_RATIO, **DECODER, **start.kwargs)
    optimizer = create_optimizer_v2(objective, opt='adamw', lr=LR, weight_decay=0.05, betas=(0.9, 0.95))
    scheduler = schedule(optimizer, UPDATES, LR)
    generator = torch.Generator().manual_seed(seed)
    objective.train()
    for i, batch in enumerate(batches(data, UPDATES, BATCH, seed)):
        scheduler.step_update(i)
        masked = torch.stack([
            random_masking(objective.grid_size, objective.num_masked, generator) for _ in batch.images])
        loss = objective(normalised(batch.images, student), masked)['loss']
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(objective.parameters(), MAX_NORM)
        optimizer.step()
        objective.after_update((i + 1) / UPDATES)
    return student.state_dict()


def build(start: Start, state: StateDict, seed: int) -> TwoTasks:
    """A network with the weights of `state`; all others, and for scratch all, are new."""
    random_seed(seed)
    model = timm.create_model(
        MODEL_NAME, **MODEL, img_size=SIDE, num_classes=NUM_CLASSES, head_init_scale=1., pyramid=True)
    new = ('head.', 'pyramid.') if start.new_pyramid else ('head.',)
    state = {key: value for key, value in state.items() if not key.startswith(new)}
    rest = {key: value for key, value in model.state_dict().items() if not state or key.startswith(new)}
    model.load_state_dict({**state, **rest})
    return TwoTasks(model, level=0)


def markdown_table(rows: Sequence[Row]) -> str:
    """Means over seeds in percent, one line per start in the order of the rows."""
    labels = sorted({row['labels'] for row in rows})
    header = ('start', *(f'{value}, {num} labels' for num in labels for value in ('top-1', 'mIoU')), 'seeds')
    lines = []
    for name in dict.fromkeys(row['start'] for row in rows):
        values = [percent(mean(rows, value, start=name, labels=num)) for num in labels for value in ('top1', 'miou')]
        lines.append((name, *values, str(len({row['seed'] for row in rows if row['start'] == name}))))
    return lines_as_markdown(header, lines)

"""What acceleration costs on photographs of solar cells, a few of them defective, and what pre-training on them gives.

`elpv-dataset` has 2,624, grey, 300 x 300 pixels (CC BY-NC-SA 4.0, no part of this package); every fourth is held out.
"""
from collections.abc import Iterator
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.utils import random_seed

from ..pretrain.pixel import Pixel
from .acceleration import SETTINGS
from .canvases import Canvases
from .pretraining import pretrain
from .results import Measurement, as_it_is_and_tuned
from .two_tasks import State, Training, fit, normalised

_SIDE = 320  # pixels
_MODEL: dict[str, Any] = dict(embed_dim=128, depths=(1, 1, 6), num_heads=4)
_DECODER: dict[str, Any] = dict(decoder_dim=128, decoder_depth=2, decoder_num_heads=4)
_NUM_MASKED = 48  # of the 64 tokens of the smaller side
_PRETRAINING = Training(1200, 64, 2e-3)
_TRAININGS = {128: Training(740, 32, 1e-3), _SIDE: Training(62, 32, 5e-4)}  # by side
_TUNING = Training(31, 32, 2e-4)

_PRETRAINED = 'off, pre-trained on them'
ARMS = (*SETTINGS, _PRETRAINED)


def study_seed(seed: int, device: str) -> Iterator[Measurement]:
    """Train without acceleration, on small images first, from scratch and pre-trained; then as `acceleration` does."""
    from elpv_dataset.utils import load_dataset

    images, certainty = (torch.from_numpy(array.copy()) for array in load_dataset()[:2])
    large, labels = _resized(images[:, None], _SIDE), (certainty > 0.5).long()
    held_out = torch.arange(len(labels)) % 4 == 0
    train_set, test_set = (Canvases(large[part], labels[part], labels[part]) for part in (~held_out, held_out))
    sets = {side: train_set._replace(images=_resized(train_set.images, side)) for side in _TRAININGS}
    small = min(sets)
    for arms in (SETTINGS, [_PRETRAINED]):
        state: State = {}
        if _PRETRAINED in arms:
            state = pretrain(Pixel, sets[small], _PRETRAINING, seed, device, _NUM_MASKED, _MODEL, _DECODER)
        random_seed(seed)
        model = _model('off', state, device, img_size=small)
        for side, training in _TRAININGS.items():
            model.set_input_size(side)
            _train(model, sets[side], training, seed)
        yield from as_it_is_and_tuned(
            arms, partial(_model, state=model.state_dict(), device=device),
            tune=partial(_train, data=train_set, training=_TUNING, seed=seed), test=partial(_test, data=test_set))


def _resized(images: torch.Tensor, side: int) -> torch.Tensor:
    """(M, 1 or 3, h, w) -> (M, 3, side, side), which are views of one channel."""
    return F.interpolate(images[:, :1], (side, side), mode='bilinear', antialias=True).expand(-1, 3, -1, -1)


def _model(arm: str, state: State, device: str, **kwargs: Any) -> Any:
    """A classifier with the weights of `state`, as far as they are there; all others are new."""
    kwargs = {'img_size': _SIDE, 'num_classes': 2, **_MODEL, **SETTINGS.get(arm, {}), **kwargs}
    model = timm.create_model('fast_itpn_tiny', **kwargs)
    model.load_state_dict({key: state.get(key, value) for key, value in model.state_dict().items()})
    return model.to(device)


def _train(model: Any, data: Canvases, training: Training, seed: int) -> None:
    """Train with batches that are turned and mirrored at random."""
    def loss_of(batch: Canvases) -> torch.Tensor:
        turns, mirrored = torch.randint(4, (2,)).tolist()
        images = batch.images.rot90(turns, (2, 3)).flip([3] if mirrored % 2 else [])
        return F.cross_entropy(model(normalised(images, model)), batch.labels)

    fit(model, loss_of, data, training, seed)


@torch.inference_mode()
def _test(model: Any, data: Canvases) -> dict[str, float]:
    """Accuracy, and average precision of the class of the defective, in percent."""
    from sklearn.metrics import average_precision_score

    logits = torch.cat([model.eval()(normalised(images, model)).cpu() for images in data.images.split(32)])
    right = (logits.argmax(dim=1) == data.labels).float().mean().item()
    return {'top-1': 100 * right, 'AP': 100 * average_precision_score(data.labels, logits[:, 1] - logits[:, 0])}

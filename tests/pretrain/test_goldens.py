"""Predictions and losses of the official pre-training models, through weights in their layout."""
import pytest
import torch
from support import golden

from timm_itpn.pretrain.objectives import create_objective, create_student
from timm_itpn.pretrain.task import native_weights
from timm_itpn.weights.layout import native_to_official, official_to_native


def build(name, objective, expected, teacher_dim=None):
    """An objective in float64 with the golden weights, and all of them come out again."""
    objective = create_objective(objective, create_student(name, objective, 224), teacher_dim=teacher_dim).double()
    official = golden.official_state_dict(expected)
    native = official_to_native(official)
    state_dict = objective.state_dict()
    for key, value in state_dict.items():
        [native_key] = native_weights({key: value})
        state_dict[key] = native[native_key]
    objective.load_state_dict(state_dict)
    again = native_to_official(native_weights(objective.state_dict()))
    assert set(again) == set(official)
    assert all(torch.equal(again[key], official[key]) for key in official)
    return objective.eval()


@pytest.mark.parametrize('size', ['tiny', pytest.param('base', marks=pytest.mark.slow)])
def test_clip_predictions_hold(size):
    expected = golden.load(f'fast_itpn_{size}_mim')
    objective = build(f'fast_itpn_{size}', 'clip', expected, teacher_dim=768)
    masked = torch.from_numpy(golden.noise('mask', (2, 196)) > 0.2).reshape(2, 14, 14)
    assert int(masked.sum()) == expected['masked']
    with torch.no_grad():
        prediction = objective.predict(golden.image(expected), masked)
    assert golden.error(prediction[masked.flatten(1)], expected['prediction']) < 2e-7


def test_clip_distill_predictions_hold():
    expected = golden.load('itpn_base_clip_distill')
    objective = build('itpn_base', 'clip-distill', expected, teacher_dim=512)
    masked = torch.from_numpy(golden.noise('mask', (2, 196)) > 0.2).reshape(2, 14, 14)
    with torch.no_grad():
        prediction, auxiliary = objective.predict(golden.image(expected), masked)
    assert golden.error(prediction, expected['prediction']) < 5e-6
    assert golden.error(auxiliary, expected['aux_prediction']) < 5e-6


def test_pixel_predictions_and_loss_hold(monkeypatch):
    expected = golden.load('itpn_base_mae')
    objective = build('itpn_base', 'pixel', expected)
    noise = torch.from_numpy(golden.noise('noise', (2, 196)))
    masked = (noise.argsort(dim=1).argsort(dim=1) >= 49).reshape(2, 14, 14)
    predict, predictions = objective.predict, []
    monkeypatch.setattr(objective, 'predict', lambda *args: predictions.append(predict(*args)) or predictions[-1])
    with torch.no_grad():
        loss = objective(golden.image(expected), masked)['loss']
    assert golden.error(*predictions, expected['prediction']) < 5e-6
    assert abs(loss.item() / expected['loss'] - 1) < 5e-6

"""What takes part, with which weights; and what cannot, with the reason."""
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn as nn

from timm_itpn.acceleration.stage import MigrationStage
from timm_itpn.bench.candidates import _in_onnx, build, build_ours
from timm_itpn.bench.cases import Asked, Case

pytestmark = pytest.mark.usefixtures('small_models')

CASE = Case('fast_itpn_tiny', (32, 32), 2)
PYRAMID = Case('fast_itpn_tiny', (64, 32), 2, pyramid=True)
FILE = """
import torch.nn as nn
from neighbour import SIDE

def build(img_size, num_classes):
    return nn.Linear(img_size[0] * SIDE, num_classes)

def number(**kwargs):
    return 5

def fails(**kwargs):
    return 1 / 0
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'path', list(sys.path))  # a file's folder is added
    (tmp_path / 'neighbour.py').write_text('SIDE = 3')
    path = tmp_path / 'mine.py'
    path.write_text(FILE)
    return path


def test_ours_is_first_and_every_form_has_its_weights():
    asked = Asked(baseline=True, fuse=True, compile='default', peers=('test_vit',), acceleration=('full',))
    candidates = build(CASE, asked)
    names = ['ours', 'ours fused', 'ours full', 'ours full fused']
    assert [c.name for c in candidates] == [
        *names, *(f'{name} compiled (default)' for name in names), 'baseline', 'test_vit']
    same_function = [True, True, False, False]
    assert [c.same_function for c in candidates] == [*same_function, *same_function, True, False]
    assert [c.name for c in candidates if not c.same_weights] == ['test_vit']
    assert not any(c.model.training for c in candidates)
    ours, full, full_fused = (candidates[i] for i in (0, 2, 3))
    assert full_fused.model is full.model is full.run is not full_fused.run
    assert candidates[4].model is ours.model and candidates[4].run is not ours.model
    assert isinstance(full.model.stages[2], MigrationStage) and not isinstance(ours.model.stages[2], MigrationStage)
    torch.testing.assert_close(full.model.state_dict(), ours.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize('model', ['fast_itpn_tiny_fpn', 'hivit_tiny'])
def test_pyramid_gives_its_levels(model):
    ours, full = build(replace(PYRAMID, model=model), Asked(acceleration=('full',)))
    for candidate in (ours, full):
        with torch.inference_mode():
            levels = candidate.run(torch.randn(2, 3, 64, 32))
        assert [tuple(level.shape[-2:]) for level in levels] == [(16, 8), (8, 4), (4, 2), (2, 1), (1, 1)]
        assert all(0.01 < level.std() < 100 for level in levels)


def test_baseline_has_the_pyramid_of_ours():
    ours, baseline = (c.model.double() for c in build(PYRAMID, Asked(baseline=True)))
    images = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(baseline(images), ours(images), rtol=1e-5, atol=1e-5)  # its scores are float32


def test_type_and_mode_are_those_of_the_case():
    case = replace(CASE, dtype='bfloat16', mode='train')
    for candidate in build(case, Asked(baseline=True, peers=('test_vit',))):
        assert {parameter.dtype for parameter in candidate.model.parameters()} == {torch.bfloat16}
        assert candidate.model.training
    ours = build(replace(CASE, dtype='amp_bfloat16'), Asked())[0].model
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}


def test_every_layer_shows_in_the_output():
    model, images = build_ours(CASE).eval(), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        logits = model(images)
        assert torch.equal(logits, build_ours(CASE).eval()(images))
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and ('blocks' not in name or 'blocks.0' in name):
                kept = parameter.clone()
                parameter.mul_(1.5)
                assert (model(images) - logits).norm() / logits.norm() > 1e-3, name
                parameter.copy_(kept)


@pytest.mark.parametrize('size', [(160, 160), (64, 32)])  # its own, and another
def test_peer_takes_the_size_of_the_case(size):
    peer = build(replace(CASE, img_size=size), Asked(peers=('test_vit',)))[1].model
    assert peer.patch_embed.img_size == size


@pytest.mark.parametrize('size, name, message', [
    ((64, 64), 'test_resnet', r'^test_resnet cannot take images of 64 x 64 pixels: .*img_size'),
    ((32, 48), 'vit_small_patch32_224', '32 x 48 pixels: its patches of 32 would leave out the border'),
    ((32, 32), 'vit_nope', "^timm has no model 'vit_nope': look it up with"),
])
def test_peer_that_cannot_take_part_is_refused(size, name, message):
    with pytest.raises(ValueError, match=message):
        build(replace(CASE, img_size=size), Asked(peers=(name,)))


def test_function_of_a_file_is_called_with_size_and_classes(file):
    module = build(replace(CASE, img_size=(64, 32)), Asked(against=f'{file}:build'))[1].model
    assert isinstance(module, nn.Linear) and module.weight.shape == (1000, 64 * 3)


@pytest.mark.parametrize('source, message', [
    ('mine.py', ": no file ''; give FILE:FUNCTION, such as my_model.py:build"),
    ('{file}x:build', ": no file '{file}x'; give FILE:FUNCTION, such as my_model.py:build"),
    ('{file}:nope', " cannot be built: KeyError: 'nope'"),
    ('{file}:fails', ' cannot be built: ZeroDivisionError: division by zero'),
    ('{file}:number', ' cannot be built: TypeError: number returned int, not a torch.nn.Module'),
])
def test_module_that_cannot_be_built_is_refused(source, message, file):
    source = source.format(file=file)
    with pytest.raises(ValueError) as error:
        build(CASE, Asked(against=source))
    assert str(error.value) == f'--against {source}{message.format(file=file)}'


@pytest.mark.parametrize('model, objective', [('fast_itpn_tiny', 'clip'), ('itpn_tiny', 'pixel')])
def test_step_of_pre_training_is_that_of_the_objective(model, objective):
    case = Case(model, (64, 64), 2, mode='train', pyramid=True)
    step = build(case, Asked(objective=objective))[1]
    assert step.name == f'ours pre-training ({objective})' and not step.same_weights and step.model.training
    (loss,) = step.run(torch.randn(2, 3, 64, 64))
    assert step.model.masked.sum(dim=(1, 2)).tolist() == 2 * [step.model.objective.num_masked]
    assert (step.model.target is not None) == objective.startswith('clip')
    loss.backward()
    missing = [name for name, p in step.model.objective.backbone.named_parameters() if p.grad is None]
    assert all(name.startswith('stages.2.pos_embed') for name in missing), missing


def test_kept_templates_give_what_everything_anew_does():
    case = Case('fast_itpn_tiny', (64, 64), 1, templates=2)
    candidates = build(case, Asked(baseline=True, fuse=True, acceleration=('full',)))
    assert [c.name for c in candidates] == ['ours', 'ours fused', 'ours full', 'ours full fused', 'baseline']
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        outputs = {c.name: c.run(images)[0] for c in candidates}
    for name in ('ours fused', 'baseline'):
        torch.testing.assert_close(outputs[name], outputs['ours'], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(outputs['ours full fused'], outputs['ours full'], rtol=1e-3, atol=1e-3)
    assert (outputs['ours full'] - outputs['ours']).abs().max() > 1e-2
    ours = candidates[0].model.train()
    ours(images)[0].sum().backward()
    assert ours.encoder.pos_embed['template'].grad.abs().sum() > 0


def test_onnx_runtime_gives_the_same():
    model = nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.Flatten(1)).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(_in_onnx(model, CASE)(images)[0], model(images), rtol=1e-4, atol=1e-4)

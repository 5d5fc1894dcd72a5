"""Who takes part, with which weights; and who cannot, with the reason."""
import sys

import pytest
import torch
import torch.nn as nn

from timm_itpn.acceleration import MigrationStage
from timm_itpn.bench.cases import Case, Rivals
from timm_itpn.bench.contestants import Kind, build, build_against, build_ours, build_peer, checkpoint_gradients

CASE = Case('fast_itpn_tiny', 32, 2)
PYRAMID = Case('fast_itpn_tiny', '64x32', 2, pyramid=True)
BUILD = """
import torch.nn as nn
from neighbour import SIDE

def build(img_size, *, num_classes):
    return nn.Linear(img_size[0] * SIDE, num_classes)

def plain():
    return nn.Linear(2, 3)

def everything(**kwargs):
    return nn.Linear(len(kwargs), 1)

def wrong():
    return 5

VALUE = 7
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'path', list(sys.path))  # a file's folder is added
    (tmp_path / 'neighbour.py').write_text('SIDE = 3')
    path = tmp_path / 'mine.py'
    path.write_text(BUILD)
    return path


def test_ours_is_first_and_everyone_is_in_order():
    contestants = build(CASE, Rivals(baseline=True, fuse=True, compile='default', peers=('test_vit',)), 'cpu')
    assert [(c.name, c.kind) for c in contestants] == [
        ('ours', Kind.SAME_FUNCTION),
        ('ours fused', Kind.SAME_FUNCTION),
        ('ours compiled (default)', Kind.SAME_FUNCTION),
        ('ours fused compiled (default)', Kind.SAME_FUNCTION),
        ('baseline', Kind.SAME_FUNCTION),
        ('test_vit', Kind.OTHER),
    ]
    assert not any(c.model.training for c in contestants)
    assert contestants[2].model is contestants[0].model and contestants[2].run is not contestants[0].model
    assert [contestants.index(next(c for c in contestants if c.model is d.plain)) for d in contestants] == [
        0, 0, 0, 0, 4, 5]


def test_accelerations_have_the_forms_and_the_weights_of_ours():
    rivals = Rivals(fuse=True, compile='default', accelerations=('full', 'light'))
    contestants = build(CASE, rivals, 'cpu')
    names = ['ours', 'ours fused', 'ours full', 'ours full fused', 'ours light', 'ours light fused']
    assert [c.name for c in contestants] == [*names, *(f'{name} compiled (default)' for name in names)]
    kinds = [Kind.SAME_FUNCTION] * 2 + [Kind.ACCELERATED] * 4
    assert [c.kind for c in contestants] == [*kinds, *kinds]
    ours, full, full_fused = (contestants[i].model for i in (0, 2, 3))
    assert contestants[3].plain is contestants[2].plain is full and full_fused is not full
    assert isinstance(full.stages[2], MigrationStage) and not isinstance(ours.stages[2], MigrationStage)
    assert full.stages[2].migrate != contestants[4].model.stages[2].migrate
    torch.testing.assert_close(full.state_dict(), ours.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize('model', ['fast_itpn_tiny', 'fast_itpn_tiny_fpn', 'itpn_tiny', 'hivit_tiny'])
def test_pyramid_gives_its_levels(model):
    ours, full = build(PYRAMID._replace(model=model), Rivals(accelerations=('full',)), 'cpu')
    for contestant in (ours, full):
        with torch.inference_mode():
            levels = contestant.run(torch.randn(2, 3, 64, 32))
        assert [tuple(level.shape[-2:]) for level in levels] == [(16, 8), (8, 4), (4, 2), (2, 1), (1, 1)]
        assert isinstance(levels, list) and all(0.01 < level.std() < 100 for level in levels)
    torch.testing.assert_close(full.model.state_dict(), ours.model.state_dict(), rtol=0, atol=0)


def test_baseline_has_the_pyramid_of_ours():
    ours, baseline = (c.model.double() for c in build(PYRAMID, Rivals(baseline=True), 'cpu'))
    images = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    with torch.inference_mode():
        expected, levels = ours(images), baseline(images)
    assert len(levels) == len(expected) == 5 and all(level.is_contiguous() for level in levels)
    torch.testing.assert_close(levels, expected, rtol=1e-5, atol=1e-5)  # its scores are float32
    assert baseline.pyramid is not ours.model.pyramid and not hasattr(baseline, 'head')


def test_gradients_are_checkpointed_in_everyone():
    case = PYRAMID._replace(mode='train', grad_checkpointing=True)
    contestants = build(case, Rivals(baseline=True, accelerations=('full',)), 'cpu')
    checkpoint_gradients(contestants)
    for contestant in contestants:
        assert {m.grad_checkpointing for m in contestant.model.modules() if hasattr(m, 'grad_checkpointing')} == {True}


def test_images_need_not_be_square():
    case = CASE._replace(size='48x32')
    ours, baseline = (c.model for c in build(case, Rivals(baseline=True), 'cpu'))
    assert ours.stages[2].grid_size == (3, 2) and baseline.pos_embed.shape[1] == 6
    assert ours(torch.randn(1, 3, 48, 32)).shape == baseline(torch.randn(1, 3, 48, 32)).shape == (1, 1000)


def test_all_have_the_type_and_the_mode_of_the_case():
    case = CASE._replace(dtype='bfloat16', mode='train')
    for contestant in build(case, Rivals(baseline=True, peers=('test_vit',)), 'cpu'):
        assert {parameter.dtype for parameter in contestant.model.parameters()} == {torch.bfloat16}
        assert contestant.model.training
    ours = build(CASE._replace(dtype='amp_bfloat16'), Rivals(), 'cpu')[0].model
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}


def test_weights_make_every_layer_count_and_repeat():
    model, images = build_ours(CASE).eval(), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        logits = model(images)
        assert torch.equal(logits, build_ours(CASE).eval()(images))
        assert 0.3 < logits.std() < 3
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                continue
            kept = parameter.clone()
            parameter.mul_(1.5)
            assert (model(images) - logits).norm() / logits.norm() > 1e-3, name
            parameter.copy_(kept)


@pytest.mark.parametrize('case', [CASE, PYRAMID])
def test_baseline_of_another_family_is_refused(case):
    with pytest.raises(ValueError, match=r'^itpn_tiny has no baseline: only the models named fast_itpn_\* have$'):
        build(case._replace(model='itpn_tiny'), Rivals(baseline=True), 'cpu')


def test_peer_is_told_its_size_only_if_it_is_not_its_own():
    assert build_peer('test_vit', 160).patch_embed.img_size == (160, 160)  # its own
    assert build_peer('test_vit', 64).patch_embed.img_size == (64, 64)
    assert build_peer('test_vit', '64x32').patch_embed.img_size == (64, 32)
    with pytest.raises(ValueError, match=r'^test_resnet cannot take images of 64 x 64 pixels: .*img_size'):
        build_peer('test_resnet', 64)


@pytest.mark.parametrize('size', [40, '32x40', '40x32'])
def test_peer_that_would_see_a_part_of_the_image_is_refused(size):
    with pytest.raises(ValueError, match=r'^vit_tiny_patch16_224 .* it has patches of 16, and would see only a part$'):
        build_peer('vit_tiny_patch16_224', size)


def test_unknown_peer_is_refused():
    with pytest.raises(ValueError, match="^timm has no model 'vit_nope'"):
        build_peer('vit_nope', 32)


@pytest.mark.parametrize('function, shape', [('build', (7, 15)), ('plain', (3, 2)), ('everything', (1, 2))])
def test_function_of_a_file_gets_the_arguments_that_it_takes(function, shape, file, monkeypatch):
    monkeypatch.setattr('timm_itpn.bench.contestants.NUM_CLASSES', 7)
    module = build_against(f'{file}:{function}', 5)
    assert isinstance(module, nn.Linear) and module.weight.shape == shape
    if function == 'build':
        assert build_against(f'{file}:{function}', '4x9').weight.shape == (7, 12)


@pytest.mark.parametrize('place, message', [
    ('mine.py', 'give FILE:FUNCTION, such as my_model.py:build'),
    ('{file}x:build', 'there is no file {file}x'),
    ('{file}:nope', '{file} has no function nope'),
    ('{file}:VALUE', '{file} has no function VALUE'),
    ('{file}:wrong', 'wrong returned int, not a torch.nn.Module'),
])
def test_what_cannot_be_built_is_refused(place, message, file):
    place = place.format(file=file)
    with pytest.raises(ValueError) as error:
        build_against(place, 32)
    assert str(error.value) == f'--against {place}: {message.format(file=file)}'


def test_file_with_an_error_is_named(tmp_path):
    (tmp_path / 'broken.py').write_text('1 / 0')
    with pytest.raises(ValueError, match='broken.py cannot be run: ZeroDivisionError: division by zero$'):
        build_against(f'{tmp_path / "broken.py"}:build', 32)


@pytest.mark.parametrize('model, objective', [
    ('fast_itpn_tiny', 'clip'), ('itpn_base', 'clip-distill'), ('fast_itpn_tiny', 'pixel'), ('fast_itpn_tiny', 'mfm')])
def test_step_of_pre_training_is_that_of_the_objective(model, objective):
    case = PYRAMID._replace(model=model, size=64, mode='train')
    step = build(case, Rivals(objective=objective), 'cpu')[1]
    assert step.name == f'ours pre-training ({objective})' and step.kind is Kind.OTHER and step.model.training
    images = torch.randn(2, 3, 64, 64)
    (loss,) = step.run(images)
    masked, target = step.model.masked, step.model.target
    assert masked.shape == (2, 4, 4) and masked.any() and not masked.all()
    assert loss.shape == () and (target is not None) == objective.startswith('clip')
    loss.backward()
    missing = [name for name, p in step.model.objective.backbone.named_parameters() if p.grad is None]
    assert all(name.startswith('stages.2.pos_embed') for name in missing), missing

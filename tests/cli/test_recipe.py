"""The recipes: the authors' numbers, in a form that timm takes."""
from functools import partial

import pytest
import timm
import torch
import yaml
from support.detect_runs import parse
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from timm_itpn.cli import main
from timm_itpn.detection.data import MAX_SIDE, SIDES, train_transforms
from timm_itpn.detection.model import mask_rcnn, param_groups
from timm_itpn.models import MODULES

# epochs, warm-up epochs, images per update, lr, layer decay, drop path, image side
RECIPES = {
    'fast_itpn_tiny': (100, 5, 1024, 1e-4, 0.80, 0.1, 224),
    'fast_itpn_small': (100, 5, 1024, 1e-4, 0.90, 0.1, 224),
    'fast_itpn_base': (20, 3, 1024, 1e-4, 0.90, 0.1, 224),
    'fast_itpn_large': (20, 3, 512, 5e-5, 0.95, 0.2, 640),
    'itpn_base.clip_in1k': (100, 20, 1024, 5e-4, 0.60, 0.1, 224),
    'itpn_base.pixel_in1k': (100, 5, 1024, 4e-4 * 4, 0.81, 0.15, 224),  # 0.60 ** (13 / 32)
    'itpn_large.clip_in1k': (50, 5, 512, 2e-4, 0.55, 0.25, 224),
    'itpn_large.pixel_in1k': (50, 5, 1024, 1e-3 * 4, 0.84, 0.2, 224),  # 0.55 ** (13 / 45)
}
OTHERS = ('mask_rcnn', 'mask_rcnn_digits', 'mask_rcnn_large', 'upernet',
          'pretrain_fast_itpn', 'pretrain_itpn_clip', 'pretrain_itpn_pixel', 'pretrain_mfm')


def read(name, capsys):
    assert main(['recipe', name]) == 0
    text = capsys.readouterr().out
    return text, yaml.safe_load(text)


def test_names_are_listed_and_every_model_with_weights_has_one(capsys):
    assert main(['recipe']) == 0
    assert capsys.readouterr().out.split() == sorted([*RECIPES, *OTHERS])
    models = timm.list_models(module=MODULES, exclude_filters=('*_fpn', 'hivit*'), include_tags=True)
    assert {name.split('.')[0] for name in models if '.' in name} == {name.split('.')[0] for name in RECIPES}


# epochs, steps of the schedule, lr, layer decay, drop path
@pytest.mark.parametrize('name, numbers', [
    ('mask_rcnn', (12, [9, 11], 2e-4, 0.90, 0.05)),
    ('mask_rcnn_large', (12, [9, 11], 2e-4, 0.95, 0.2)),
])
def test_mask_rcnn_recipe_is_what_the_room_takes(name, numbers, capsys):
    _, recipe = read(name, capsys)
    args = parse(['-c', name])
    assert all(getattr(args, key) == value for key, value in recipe.items())
    keys = ('epochs', 'decay_milestones', 'lr', 'layer_decay', 'drop_path')
    assert tuple(recipe[key] for key in keys) == numbers
    resize, crop = train_transforms(max_side=MAX_SIDE, **SIDES).transforms[1].transforms
    assert (recipe['short_sides'], recipe['max_side']) == (resize.min_size, resize.max_size)
    assert recipe['crop_short_sides'] == crop.transforms[0].min_size
    assert recipe['crop_sides'] == list(crop.transforms[1].keywords.values())
    with torch.device('meta'):
        model = mask_rcnn(recipe['model'], 81, dict(recipe['model_kwargs'], drop_path_rate=recipe['drop_path']))
    assert not any(key.endswith('relative_position_bias_table') for key in model.state_dict())
    optimizer = create_optimizer_v2(
        model, opt=recipe['opt'], lr=recipe['lr'], betas=recipe['opt_betas'],
        param_group_fn=partial(
            param_groups, weight_decay=recipe['weight_decay'], layer_decay=recipe['layer_decay']))
    updates = 1000  # of an epoch
    scheduler, epochs = create_scheduler_v2(
        optimizer, recipe['sched'], num_epochs=recipe['epochs'], decay_rate=recipe['decay_rate'],
        decay_milestones=recipe['decay_milestones'], warmup_epochs=recipe['warmup_updates'] / updates,
        warmup_lr=recipe['warmup_lr'], updates_per_epoch=updates, step_on_epochs=False)
    rates = []
    for update in (0, 250, 500, 8998, 9000, 11000):  # timm's steps come one update early
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[-1]['lr'] / optimizer.param_groups[-1]['lr_scale'] / recipe['lr'])
    assert rates == [pytest.approx(value) for value in (0.001, 0.5005, 1, 1, 0.1, 0.01)]
    assert epochs == recipe['epochs']


def test_upernet_recipe_has_the_channels_of_its_backbone(capsys):
    _, recipe = read('upernet', capsys)
    kwargs = {key: value for key, value in recipe['backbone'].items() if value is not None and key != 'pretrained'}
    backbone = timm.create_model(**kwargs, device='meta')
    assert backbone.feature_info.channels() == recipe['channels']
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]


def test_unknown_name_is_refused_with_the_list(capsys):
    assert main(['recipe', 'resnet50']) == 1
    captured = capsys.readouterr()
    assert captured.out == ''
    assert captured.err.startswith("timm-itpn: there is no recipe for 'resnet50'; there are: fast_itpn_base")


@pytest.mark.parametrize('name', RECIPES)
def test_numbers_are_those_of_the_authors(name, capsys):
    text, recipe = read(name, capsys)
    epochs, warmup, images, lr, layer_decay, drop_path, size = RECIPES[name]
    assert (recipe['epochs'], recipe['warmup_epochs'], recipe['lr']) == (epochs, warmup, lr)
    assert (recipe['layer_decay'], recipe['drop_path']) == (layer_decay, drop_path)
    assert (recipe['model'], recipe['img_size']) == (name, size)
    assert recipe.get('model_kwargs', {'img_size': 224}) == {'img_size': size}
    assert f'{images} images per update: here {images // recipe["batch_size"]} processes' in text
    assert recipe['crop_pct'] == (0.875 if size < 384 else 1.0)
    common = dict(
        opt='adamw', weight_decay=0.05, min_lr=1e-6, warmup_lr=1e-6, reprob=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1,
        aa='rand-m9-mstd0.5-inc1', model_ema=True, model_ema_decay=0.9999, interpolation='bicubic',
        mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    assert {key: recipe[key] for key in common} == common


@pytest.mark.parametrize('name', ['fast_itpn_tiny', 'itpn_base.clip_in1k'])
def test_timm_builds_what_the_recipe_says(name, capsys):
    _, recipe = read(name, capsys)
    model = timm.create_model(
        recipe['model'], num_classes=recipe['num_classes'], drop_path_rate=recipe['drop_path'], device='meta',
        **recipe.get('model_kwargs', {}))
    assert model.patch_embed.img_size == (recipe['img_size'],) * 2
    optimizer = create_optimizer_v2(
        model, opt=recipe['opt'], lr=recipe['lr'], weight_decay=recipe['weight_decay'],
        layer_decay=recipe['layer_decay'])
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched=recipe['sched'], num_epochs=recipe['epochs'], warmup_epochs=recipe['warmup_epochs'],
        warmup_lr=recipe['warmup_lr'], min_lr=recipe['min_lr'])
    assert epochs == recipe['epochs']
    scheduler.step(recipe['warmup_epochs'])
    head = max(group['lr'] for group in optimizer.param_groups)
    assert 0.9 * recipe['lr'] < head <= recipe['lr']

"""The recipes: the authors' numbers, in a form that timm takes."""
import pytest
import timm
import torch
import yaml
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from timm_itpn.cli import main
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
OTHERS = ('mask_rcnn', 'upernet', 'pretrain_fast_itpn', 'pretrain_itpn_clip', 'pretrain_itpn_pixel', 'pretrain_mfm')


def read(name, capsys):
    assert main(['recipe', name]) == 0
    text = capsys.readouterr().out
    return text, yaml.safe_load(text)


def test_names_are_listed_and_every_model_with_weights_has_one(capsys):
    assert main(['recipe']) == 0
    assert capsys.readouterr().out.split() == sorted([*RECIPES, *OTHERS])
    models = timm.list_models(module=MODULES, exclude_filters=('*_fpn', 'hivit*'), include_tags=True)
    assert {name.split('.')[0] for name in models if '.' in name} == {name.split('.')[0] for name in RECIPES}


def test_mask_rcnn_recipe_is_one_that_torchvision_runs(capsys):
    pytest.importorskip('torchvision', reason='torchvision is not installed')
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    from timm_itpn.models.detection import DetectionBackbone
    _, recipe = read('mask_rcnn', capsys)
    kwargs = {key: value for key, value in recipe['backbone'].items() if value is not None and key != 'pretrained'}
    backbone = DetectionBackbone(**kwargs, embed_dim=128, depths=(1, 1, 1), num_heads=2)
    assert backbone.out_channels == recipe['out_channels']
    assert list(recipe['levels'].values()) == backbone.body.feature_info.reduction()
    sizes, ratios = recipe['anchors']['sizes'], recipe['anchors']['aspect_ratios']
    model = MaskRCNN(
        backbone,
        num_classes=2,
        rpn_anchor_generator=AnchorGenerator(tuple((size,) for size in sizes), (tuple(ratios),) * len(sizes)),
        box_roi_pool=MultiScaleRoIAlign(recipe['roi_levels'], output_size=7, sampling_ratio=2),
        min_size=64,
        max_size=96,
    ).eval()
    with torch.inference_mode():
        assert set(model([torch.rand(3, 60, 90)])[0]) == {'boxes', 'labels', 'scores', 'masks'}


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

"""The detector: the authors' settings, torchvision's classes, what the losses are, and layer decay."""
import logging

import pytest
import timm
import torch
from sklearn.datasets import load_sample_images
from support.coco import write_coco
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from timm_itpn.detection.data import CocoDataset, eval_transforms
from timm_itpn.detection.model import Anchors, BoxAndMaskHeads, compute_losses, mask_rcnn, param_groups
from timm_itpn.models.detection import DetectionBackbone

pytestmark = pytest.mark.usefixtures('one_thread')

TINY = dict(embed_dim=64, depths=(1, 1, 2), num_heads=1, pyramid_dim=32)
SMALL = dict(box_batch_size_per_image=16, rpn_batch_size_per_image=32, rpn_post_nms_top_n_train=50,
             rpn_post_nms_top_n_test=50, min_size=64, max_size=128)


def detector(name='fast_itpn_tiny_fpn', num_classes=11, head_dim=32, **kwargs):
    torch.manual_seed(0)
    return mask_rcnn(name, num_classes, TINY, head_dim, **{**SMALL, **kwargs})


@pytest.fixture(scope='module')
def sample(tmp_path_factory):
    """A photograph with two digits, and its target."""
    folder = tmp_path_factory.mktemp('coco')
    return CocoDataset(write_coco(folder, 1), folder, eval_transforms())[0]


def test_settings_are_the_authors():
    model = mask_rcnn('fast_itpn_tiny_fpn', 81, dict(TINY, pyramid_dim=256))
    rpn, heads = model.rpn, model.roi_heads
    assert type(model) is MaskRCNN and isinstance(heads, BoxAndMaskHeads)
    assert (model.transform.min_size, model.transform.max_size, model.transform.size_divisible) == ((800,), 1333, 32)
    assert rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert set(rpn.anchor_generator.aspect_ratios) == {(0.5, 1., 2.)}
    assert (rpn._pre_nms_top_n, rpn._post_nms_top_n) == (
        dict(training=2000, testing=1000), dict(training=1000, testing=1000))
    assert (rpn.nms_thresh, rpn.proposal_matcher.high_threshold, rpn.proposal_matcher.low_threshold) == (0.7, 0.7, 0.3)
    assert (rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (256, 0.5)
    assert (heads.fg_bg_sampler.batch_size_per_image, heads.fg_bg_sampler.positive_fraction) == (512, 0.25)
    assert heads.proposal_matcher.high_threshold == heads.proposal_matcher.low_threshold == 0.5
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.05, 0.5, 100)
    assert heads.box_coder.weights == (10, 10, 5, 5)
    for pool, side in ((heads.box_roi_pool, 7), (heads.mask_roi_pool, 14)):
        assert (pool.output_size, pool.sampling_ratio, pool.featmap_names) == ((side,) * 2, 0, ('0', '1', '2', '3'))
    layers = [type(layer).__name__ for layer in heads.box_head.modules() if not list(layer.children())]
    assert layers == ['Conv2d', 'BatchNorm2d', 'ReLU'] * 4 + ['Flatten', 'Linear', 'ReLU']
    assert heads.box_predictor.bbox_pred.weight.shape == (81 * 4, 1024)
    assert [tuple(conv[0].weight.shape) for conv in heads.mask_head] == [(256, 256, 3, 3)] * 4
    assert heads.mask_predictor.mask_fcn_logits.out_channels == 81


def test_anchors_are_at_the_strides():
    levels = [torch.zeros(2, 4, -(-800 // stride), -(-1344 // stride), dtype=torch.bfloat16)
              for stride in (4, 8, 16, 32, 64)]
    one, two = Anchors()(ImageList(torch.zeros(2, 3, 800, 1344), [(800, 1333)] * 2), levels)
    assert torch.equal(one, two) and one.dtype == torch.float32
    last = one[-13 * 21 * 3:].reshape(13, 21, 3, 4)
    centres = (last[..., :2] + last[..., 2:]) / 2
    assert torch.equal(centres[..., 0, :], torch.stack(torch.meshgrid(
        64. * torch.arange(21), 64. * torch.arange(13), indexing='xy'), dim=-1))
    assert last[0, 0, 1].tolist() == [-256, -256, 256, 256]


def test_box_loss_is_generalised_iou_of_decoded_boxes():
    heads = detector().roi_heads.train()
    proposal, truth = torch.tensor([[0., 0., 20., 20.]]), torch.tensor([[10., 0., 30., 20.]])
    sampled = ([proposal], [torch.tensor([0])], [torch.tensor([3])], None)
    heads.select_training_samples = lambda *_: sampled
    deltas = torch.zeros(1, 11 * 4)
    deltas[0, 15] = 5 * 0.5  # class 3 is e ** 0.5 times as high
    heads.box_predictor.register_forward_hook(lambda *_: (torch.zeros(1, 11), deltas))
    levels = {str(i): torch.zeros(1, 32, 16 >> i, 16 >> i) for i in range(5)}
    target = dict(boxes=truth, labels=torch.tensor([3]), masks=torch.ones(1, 64, 64, dtype=torch.uint8))
    _, losses = heads(levels, [proposal], [(64, 64)], [target])
    height = 20 * torch.tensor(0.5).exp()  # around the same centre
    overlap, union, around = 10 * 20, 20 * height + 400 - 200, 30 * height
    expected = 1 - (overlap / union - (around - union) / around)
    assert torch.allclose(losses['loss_box_reg'], 10 * expected)


@pytest.mark.parametrize('name', ['fast_itpn_tiny_fpn', 'itpn_tiny_fpn'])
def test_a_few_steps_lower_the_loss(name, sample):
    image, target = sample
    model = detector(name).train()
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-3)
    losses = []
    for _ in range(12):
        torch.manual_seed(0)  # anchors and proposals are sampled
        terms = compute_losses(model, [image], [target])
        optimizer.zero_grad()
        terms['loss'].backward()
        optimizer.step()
        losses.append({key: value.item() for key, value in terms.items()})
    assert losses[0]['loss'] == pytest.approx(sum(value for key, value in losses[0].items() if key != 'loss'), rel=1e-5)
    assert losses[-1]['loss'] < 0.75 * losses[0]['loss']
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_images_without_objects_have_a_loss(sample):
    model = detector().train()
    nothing = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), masks=torch.zeros(0, 50, 70))
    terms = compute_losses(model, [torch.rand(3, 50, 70)], [nothing])
    terms['loss'].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())  # which several processes wait for
    assert terms['loss_box_reg'] == terms['loss_mask'] == 0 < terms['loss_classifier']
    both = compute_losses(model, [torch.rand(3, 50, 70), sample[0]], [nothing, sample[1]])
    assert both['loss_box_reg'] > 0 and both['loss'].isfinite()


@pytest.mark.parametrize('size', [(33, 75), (64, 64), (130, 50)])
def test_images_of_any_size_give_boxes_within_them(size):
    model = detector(box_score_thresh=0.).eval()
    with torch.inference_mode():
        output, = model([torch.rand(3, *size)])
    height, width = size
    assert len(output['boxes']) > 0
    assert (output['boxes'] >= 0).all() and (output['boxes'] <= torch.tensor([width, height] * 2)).all()
    assert output['masks'].shape == (len(output['boxes']), 1, height, width)


def test_autocast_keeps_boxes_in_float32(sample):
    image, target = sample
    model = detector(box_score_thresh=0.).train()
    seen = []
    model.roi_heads.box_roi_pool.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[1]))
    with torch.autocast('cpu', torch.bfloat16):
        losses = compute_losses(model, [image], [target])
        model.eval()
        output, = model([image])
    assert {boxes.dtype for boxes in seen} == {output['boxes'].dtype, losses['loss_box_reg'].dtype} == {torch.float32}


def test_plain_torchvision_loads_the_weights_and_predicts_the_same():
    backbone = DetectionBackbone('fast_itpn_tiny_fpn', **TINY)
    levels = ['0', '1', '2', '3']
    plain = MaskRCNN(
        backbone, 11, min_size=64, max_size=128, box_score_thresh=0., rpn_post_nms_top_n_test=10,
        box_head=FastRCNNConvFCHead((32, 7, 7), [256] * 4, [1024], norm_layer=torch.nn.BatchNorm2d),
        box_roi_pool=MultiScaleRoIAlign(levels, 7, 0), mask_roi_pool=MultiScaleRoIAlign(levels, 14, 0)).eval()
    model = detector(head_dim=256, box_score_thresh=0., rpn_post_nms_top_n_test=10).eval()
    plain.load_state_dict(model.state_dict())
    with torch.inference_mode():
        image = torch.rand(3, 64, 128)  # sides at which torchvision's anchors are at the exact strides
        expected, output = model([image])[0], plain([image])[0]
    assert all(torch.equal(output[key], expected[key]) for key in expected)


def test_base_models_start_without_the_tables_of_their_file(tmp_path, caplog):
    file = timm.create_model('itpn_tiny_fpn', features_only=True, **TINY)
    weights = {key.removeprefix('model.'): value for key, value in file.state_dict().items()}
    assert sum(key.endswith('relative_position_bias_table') for key in weights) == 2
    torch.save(weights, tmp_path / 'w.pt')
    kwargs = dict(TINY, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'w.pt')))
    with caplog.at_level(logging.INFO):
        model = mask_rcnn('itpn_tiny_fpn', 2, kwargs, head_dim=32)
    assert 'Left out the relative position bias: the model has none (rel_pos_bias=False).' in caplog.messages
    loaded = model.backbone.body.model.state_dict()
    assert {*weights} - {*loaded} == {key for key in weights if key.endswith('relative_position_bias_table')}
    assert all(torch.equal(weights[key], value) for key, value in loaded.items())
    with_tables = mask_rcnn('itpn_tiny_fpn', 2, dict(kwargs, rel_pos_bias=True), head_dim=32)
    assert {*with_tables.backbone.body.model.state_dict()} == {*weights}


@pytest.mark.parametrize('name, num_classes, message', [
    ('fast_itpn_tiny_fpn', 1, 'num_classes is 1, but it counts the background'),
    ('resnet50', 2, "there is no model 'resnet50'; there are: fast_itpn_base, "),
    ('fast_itpn_tiny', 2, 'use a model whose name ends in _fpn'),
])
def test_what_cannot_be_is_refused(name, num_classes, message):
    with pytest.raises(ValueError, match=message):
        detector(name, num_classes)


def test_photograph_at_the_authors_size():
    photo = torch.tensor(load_sample_images().images[0]).permute(2, 0, 1) / 255
    model = detector(min_size=800, max_size=1333).eval()
    shapes = []
    model.backbone.register_forward_hook(lambda _, inputs, output: shapes.append(
        (inputs[0].shape[2:], [tuple(level.shape[2:]) for level in output.values()])))
    with torch.inference_mode():
        model([photo[:, :64, :96]])
    assert shapes == [((800, 1216), [(200, 304), (100, 152), (50, 76), (25, 38), (13, 19)])]


def scales(model, **kwargs):
    """Name -> (factor on the learning rate, weight decay)."""
    found = {id(p): (group['lr_scale'], group['weight_decay']) for group in param_groups(model, **kwargs)
             for p in group['params']}
    return {name: found.pop(id(p)) for name, p in model.named_parameters()}


@pytest.mark.parametrize('name, layer_decay, depths, layers', [
    ('itpn_base_fpn', 0.9, (3, 3, 24), 30),
    ('itpn_large_fpn', 0.95, (2, 2, 40), 44),
])
def test_scales_are_the_authors(name, layer_decay, depths, layers):
    kwargs = dict(embed_dim=64, num_heads=1, depths=depths, pyramid_dim=8, rel_pos_bias=True)
    scale = scales(mask_rcnn(name, 2, kwargs, head_dim=8), layer_decay=layer_decay)
    flat: list[str] = []
    for stage, depth in enumerate(depths):
        flat += [f'stages.{stage}.downsample.'] * (stage > 0) + [f'stages.{stage}.blocks.{i}.' for i in range(depth)]
    assert len(flat) == layers + 2  # the authors count no merges
    for i, start in enumerate(flat):
        chosen = {value[0] for key, value in scale.items() if key.startswith(f'backbone.body.model.{start}')}
        assert [*chosen] == [pytest.approx(layer_decay ** (layers + 1 - (i + 1)))], start
    rest = {key: value for key, value in scale.items() if '.stages.' not in key and '.patch_embed.' not in key}
    assert {key.split('.')[3] if key.startswith('backbone') else key.split('.')[0] for key in rest} == {
        'pyramid', 'rpn', 'roi_heads'}
    assert {value[0] for value in rest.values()} == {1.}
    for key in ('patch_embed.proj.weight', 'stages.2.pos_embed'):
        assert scale[f'backbone.body.model.{key}'][0] == pytest.approx(layer_decay ** (layers + 1))
    undecayed = {key for key, value in scale.items() if value[1] == 0}
    model = mask_rcnn(name, 2, kwargs, head_dim=8)
    assert undecayed == {
        key for key, p in model.named_parameters()
        if p.ndim == 1 or key.endswith(('bias', 'pos_embed', 'relative_position_bias_table'))}
    assert {value[1] for value in scale.values()} == {0., 0.05}


def test_rates_follow_the_schedule_of_timm():
    model = mask_rcnn('fast_itpn_tiny_fpn', 2, dict(embed_dim=64, depths=(1, 1, 2), num_heads=1), head_dim=8)
    model.rpn.requires_grad_(False)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, param_group_fn=param_groups)
    assert isinstance(optimizer, torch.optim.AdamW)
    trained = {id(p) for group in optimizer.param_groups for p in group['params']}
    assert not trained & set(map(id, model.rpn.parameters()))
    scheduler, _ = create_scheduler_v2(optimizer, 'multistep', decay_milestones=[9, 11], decay_rate=0.1)
    for epoch, factor in ((0, 1), (9, 0.1), (11, 0.01)):
        scheduler.step(epoch)
        for group in optimizer.param_groups:
            assert group['lr'] == pytest.approx(1e-3 * factor * group['lr_scale'])


def test_other_backbones_are_refused():
    with pytest.raises(ValueError, match='whose backbone is a DetectionBackbone, as mask_rcnn makes it'):
        param_groups(torch.nn.ModuleDict(dict(backbone=torch.nn.Linear(2, 2))))

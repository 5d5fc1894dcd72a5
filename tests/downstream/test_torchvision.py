"""torchvision's detectors on the feature pyramid, on a photograph of two flowers."""
import pytest
import timm
import torch
from sklearn.datasets import load_sample_images

from timm_itpn.models.detection import DetectionBackbone

pytest.importorskip('torchvision', reason='torchvision is not installed')
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

pytestmark = pytest.mark.usefixtures('one_thread')

SMALL = dict(embed_dim=128, depths=(1, 1, 2), num_heads=2)
STRIDES = (4, 8, 16, 32, 64)
DETECTORS = ('MaskRCNN', 'RetinaNet')


@pytest.fixture(scope='module')
def photo():
    """The photograph, (3, 427, 640), 0 to 1."""
    return torch.tensor(load_sample_images().images[1]).permute(2, 0, 1) / 255


@pytest.fixture(scope='module')
def target(photo):
    boxes = torch.tensor([[168., 84., 447., 360.], [288., 374., 468., 427.]])
    masks = torch.zeros(2, *photo.shape[1:], dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top:bottom, left:right] = photo[0, top:bottom, left:right] > 0.5  # the flowers are the only red
    return dict(boxes=boxes, labels=torch.tensor([1, 1]), masks=masks)


def detector(kind, **kwargs):
    torch.manual_seed(0)
    backbone = DetectionBackbone('fast_itpn_tiny_fpn', **kwargs)
    anchors = AnchorGenerator(sizes=tuple((8 * stride,) for stride in STRIDES), aspect_ratios=((0.5, 1., 2.),) * 5)
    shared = dict(num_classes=2, min_size=128, max_size=192)
    if kind == 'RetinaNet':
        return RetinaNet(backbone, anchor_generator=anchors, score_thresh=0., detections_per_img=20, **shared)
    levels = ['0', '1', '2', '3']
    return MaskRCNN(
        backbone,
        rpn_anchor_generator=anchors,
        box_roi_pool=MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
        mask_roi_pool=MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2),
        rpn_post_nms_top_n_train=100,
        rpn_post_nms_top_n_test=100,
        box_score_thresh=0.,
        box_detections_per_img=20,
        **shared,
    )


def test_levels_are_those_of_timm():
    torch.manual_seed(0)
    backbone = DetectionBackbone('fast_itpn_tiny_fpn', **SMALL).eval()
    torch.manual_seed(0)  # for the same weights
    pyramid = timm.create_model(
        'fast_itpn_tiny_fpn', features_only=True, pyramid_pool='avg', **SMALL).eval()
    x = torch.randn(2, 3, 96, 160)
    with torch.inference_mode():
        levels = backbone(x)
        assert list(levels) == ['0', '1', '2', '3', '4']
        assert backbone.out_channels == 256
        for level, expected, stride in zip(levels.values(), pyramid(x), STRIDES):
            assert level.shape == (2, 256, -(-96 // stride), -(-160 // stride))
            assert torch.equal(level, expected)


@pytest.mark.parametrize('name, kwargs, shapes', [
    ('fast_itpn_tiny_fpn', dict(out_indices=(1, 3)), [(256, 8, 8), (256, 2, 2)]),
    ('fast_itpn_tiny_fpn', dict(pyramid_dim=64, out_indices=1), [(64, 1, 1)]),
    ('itpn_tiny_fpn', dict(img_size=64, out_indices=(0,)), [(256, 16, 16)]),
    ('fast_itpn_tiny', dict(out_indices=(2,)), [(128, 4, 4)]),
])
def test_arguments_reach_the_model(name, kwargs, shapes):
    backbone = DetectionBackbone(name, **SMALL, **kwargs)
    levels = backbone(torch.zeros(1, 3, 64, 64))
    assert {key: level.shape[1:] for key, level in levels.items()} == {str(i): s for i, s in enumerate(shapes)}
    assert backbone.out_channels == shapes[0][0]


@pytest.mark.parametrize('name, kwargs, channels', [
    ('fast_itpn_tiny', {}, r'\[32, 64, 128\]'),
    ('itpn_tiny_fpn', dict(pyramid_concat=True), r'\[288, 320, 384, 384, 384\]'),
])
def test_unequal_channels_are_refused_with_the_way_out(name, kwargs, channels):
    match = f'{name} have {channels} channels.*use a model whose name ends in _fpn, without pyramid_concat=True'
    with pytest.raises(ValueError, match=match):
        DetectionBackbone(name, **SMALL, **kwargs)


@pytest.mark.parametrize('kwargs', [dict(feature_cls='hook'), dict(features_only=False), dict(pyramid_width=64)])
def test_arguments_that_cannot_work_are_refused(kwargs):
    with pytest.raises(TypeError, match=next(iter(kwargs))):
        DetectionBackbone('fast_itpn_tiny_fpn', **SMALL, **kwargs)


def test_defaults_of_torchvision_are_for_these_levels():
    backbone = DetectionBackbone('fast_itpn_tiny_fpn', **SMALL)
    explicit = detector('MaskRCNN', **SMALL)
    default = MaskRCNN(backbone, num_classes=2)
    assert default.rpn.anchor_generator.sizes == explicit.rpn.anchor_generator.sizes
    assert default.rpn.anchor_generator.aspect_ratios == explicit.rpn.anchor_generator.aspect_ratios
    assert default.roi_heads.box_roi_pool.featmap_names == explicit.roi_heads.box_roi_pool.featmap_names
    assert len(RetinaNet(backbone, num_classes=2).anchor_generator.sizes) == len(STRIDES)


@pytest.mark.parametrize('kind', DETECTORS)
def test_training_step_reaches_every_parameter_of_the_backbone(kind, photo, target):
    model = detector(kind, **SMALL).train()
    losses = model([photo], [target])
    assert set(losses) == {
        'MaskRCNN': {'loss_objectness', 'loss_rpn_box_reg', 'loss_classifier', 'loss_box_reg', 'loss_mask'},
        'RetinaNet': {'classification', 'bbox_regression'},
    }[kind]
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize('kind', DETECTORS)
def test_inference_gives_boxes_in_the_photograph(kind, photo):
    model = detector(kind).eval()
    height, width = photo.shape[1:]
    with torch.inference_mode():
        portrait = photo.transpose(1, 2)
        outputs = model([photo, portrait])  # padded to one batch
    for output, (bottom, right) in zip(outputs, ((height, width), (width, height))):
        boxes = output['boxes']
        count = len(boxes)
        assert 0 < count <= 20 and boxes.shape == (count, 4)
        assert (boxes >= 0).all() and (boxes <= torch.tensor([right, bottom, right, bottom])).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert output['scores'].shape == output['labels'].shape == (count,)
        if kind == 'MaskRCNN':
            assert output['masks'].shape == (count, 1, bottom, right)
            assert output['masks'].min() >= 0 and output['masks'].max() <= 1

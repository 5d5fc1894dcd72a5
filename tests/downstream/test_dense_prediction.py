"""The detectors and segmenters of transformers that take a backbone of timm, on our models and real photographs."""
import json
from itertools import product

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from timm_itpn.models.itpn import SIZES

transformers = pytest.importorskip('transformers', reason='transformers is not installed')

NUM_LABELS = 3
LAYERS = dict(encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2,
              decoder_attention_heads=2, num_queries=10)
DETR = dict(d_model=32, **LAYERS)
RT_DETR = dict(
    d_model=32, encoder_hidden_dim=32, hidden_expansion=0.5, encoder_ffn_dim=32, encoder_attention_heads=2,
    decoder_in_channels=[32] * 3, decoder_ffn_dim=32, decoder_layers=2, decoder_attention_heads=2, num_queries=10,
    num_denoising=4)
MASKS = dict(
    feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, encoder_layers=1,
    decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=10, train_num_points=100)
ONEFORMER = dict(
    is_training=True, num_queries=10, hidden_dim=64, conv_dim=64, mask_dim=64, encoder_feedforward_dim=32,
    encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, train_num_points=100,
    text_encoder_width=64, text_encoder_num_layers=1, text_encoder_vocab_size=100, text_encoder_n_ctx=2,
    text_encoder_context_length=7, task_seq_len=7, max_seq_len=7)
# name in transformers: class of the processor, levels that it takes of a pyramid, arguments of its config
DETECTORS = {
    'Detr': ('DetrImageProcessor', [2], DETR),
    'ConditionalDetr': ('ConditionalDetrImageProcessor', [2], DETR),
    'DabDetr': ('ConditionalDetrImageProcessor', [2], dict(hidden_size=32, **LAYERS)),
    'DeformableDetr': ('DeformableDetrImageProcessor', [1, 2, 3], DETR),
    'RTDetr': ('RTDetrImageProcessor', [1, 2, 3], RT_DETR),
    'RTDetrV2': ('RTDetrImageProcessor', [1, 2, 3], RT_DETR),
    'DFine': ('RTDetrImageProcessor', [1, 2, 3], RT_DETR),
}
SEGMENTERS = {
    'MaskFormerForInstanceSegmentation': ('MaskFormerImageProcessor', [0, 1, 2, 3], dict(
        fpn_feature_size=32, mask_feature_size=32, decoder_config=dict(model_type='detr', **DETR))),
    'Mask2FormerForUniversalSegmentation': ('Mask2FormerImageProcessor', [0, 1, 2, 3], MASKS),
    'OneFormerForUniversalSegmentation': ('MaskFormerImageProcessor', [0, 1, 2, 3], ONEFORMER),
    'UperNetForSemanticSegmentation': ('SegformerImageProcessor', [0, 1, 2, 3], dict(
        hidden_size=32, auxiliary_channels=16, pool_scales=[1, 2, 3])),
}
BACKBONES = ('fast_itpn_tiny_fpn', 'itpn_tiny_fpn', 'fast_itpn_tiny')
FOUR_LEVELS = {'OneFormerForUniversalSegmentation': BACKBONES[:2]}  # it takes no fewer
SIZES_IN_PIXELS = [(224, 320), (330, 500), (640, 480)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A config of transformers has no place for sizes of a model of timm."""
    for name in ('fast_itpn_tiny', 'itpn_tiny'):
        monkeypatch.setitem(SIZES, name, dict(SIZES[name], embed_dim=64, depths=(1, 1, 2), num_heads=1))


@pytest.fixture(scope='module')
def photos():
    return [Image.fromarray(image) for image in load_sample_images().images]  # 640 x 427


def create(config_name, model_name, backbone, levels, kwargs):
    levels = levels if backbone.endswith('_fpn') else [0, 1, 2][-len(levels):]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(
        backbone_config=transformers.TimmBackboneConfig(backbone=backbone, out_indices=levels), num_labels=NUM_LABELS,
        **kwargs)
    return getattr(transformers, model_name)(config)


def check_uses(model, inputs, targets, names, folder):
    """Train on a batch, keep the model in a file, run it in bfloat16; returns its outputs for the batch."""
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable()
    loss = model.train()(**inputs, **targets).loss
    loss.backward()
    trained = [p for name, p in model.named_parameters() if 'backbone' in name and p.grad is not None]
    assert loss.isfinite() and len(trained) > 30 and all(p.grad.isfinite().all() for p in trained)
    model.eval().save_pretrained(folder)
    restored = type(model).from_pretrained(folder).eval()
    with torch.inference_mode():
        torch.manual_seed(0)  # OneFormer has dropout in evaluation too
        outputs = model(**inputs)
        torch.manual_seed(0)
        again = restored(**inputs)
        for name in names:
            assert outputs[name].isfinite().all() and torch.equal(again[name], outputs[name])
        if 'DabDetr' in type(model).__name__:  # has float32 inside with every backbone
            with torch.autocast('cpu', torch.bfloat16):
                halves = restored(**inputs)
        else:
            inputs = {key: x.bfloat16() if torch.is_floating_point(x) else x for key, x in inputs.items()}
            halves = restored.bfloat16()(**inputs)
        assert all(halves[name].isfinite().all() for name in names)
    return outputs


def cases(names, wants_multiples_of_32=()):
    """Small images for each name with one of the backbones in turn; slow, all names, backbones and sizes."""
    for i, name in enumerate(names):
        backbones = FOUR_LEVELS.get(name, BACKBONES)
        sizes = [size for size in SIZES_IN_PIXELS if name not in wants_multiples_of_32 or not any(n % 32 for n in size)]
        yield name, backbones[i % len(backbones)], (96, 160) if name in wants_multiples_of_32 else (100, 150)
        for backbone, size in product(backbones, sizes):
            yield pytest.param(name, backbone, size, marks=pytest.mark.slow)


@pytest.mark.parametrize('name, backbone, size', list(cases(DETECTORS, ('RTDetr', 'RTDetrV2', 'DFine'))))
def test_detector_trains_predicts_and_is_kept(name, backbone, size, photos, tmp_path):
    processor_name, levels, kwargs = DETECTORS[name]
    kwargs, size = dict(kwargs), dict(height=size[0], width=size[1])
    if 'hidden_expansion' in kwargs:
        is_pyramid = backbone.endswith('_fpn')
        kwargs['encoder_in_channels'] = [256] * 3 if is_pyramid else [16, 32, 64]
        kwargs['feat_strides'] = [8, 16, 32] if is_pyramid else [4, 8, 16]
    processor = getattr(transformers, processor_name)(size=size)
    boxes = [dict(bbox=[100. * i, 50., 150., 200.], category_id=i, area=30000., iscrowd=0) for i in range(2)]
    inputs = processor(
        photos, annotations=[dict(image_id=i, annotations=boxes) for i in range(2)], return_tensors='pt')
    model = create(f'{name}Config', f'{name}ForObjectDetection', backbone, levels, kwargs)
    targets = dict(labels=inputs.pop('labels'))
    outputs = check_uses(model, inputs, targets, ('logits', 'pred_boxes'), tmp_path)
    for found in processor.post_process_object_detection(outputs, threshold=0., target_sizes=[(427, 640)] * 2):
        assert len(found['boxes']) == len(found['scores']) > 0 and found['boxes'].isfinite().all()


@pytest.mark.parametrize('name, backbone, size', list(cases(SEGMENTERS)))
def test_segmenter_trains_predicts_and_is_kept(name, backbone, size, photos, tmp_path):
    processor_name, levels, kwargs = SEGMENTERS[name]
    size = dict(height=size[0], width=size[1])
    if not backbone.endswith('_fpn'):
        kwargs = dict(kwargs, **({'feature_strides': [4, 8, 16]} if 'feature_size' in kwargs else {}))
    maps = [np.tile((np.arange(640) * NUM_LABELS // 640).astype(np.uint8), (427, 1)) for _ in photos]
    is_semantic = name.startswith('UperNet')
    if is_semantic:
        kwargs = dict(kwargs, auxiliary_in_channels=256 if backbone.endswith('_fpn') else 64)
        processor = transformers.SegformerImageProcessor(size=size)
    else:
        processor = getattr(transformers, processor_name)(size=size, num_labels=NUM_LABELS)
    inputs = processor(photos, segmentation_maps=maps, return_tensors='pt')
    targets = {key: inputs.pop(key) for key in list(inputs) if key.endswith('labels')}
    if name.startswith('OneFormer'):  # its own processor needs a vocabulary
        inputs['task_inputs'] = torch.randint(0, 99, (2, 7))
        inputs['text_inputs'] = torch.randint(0, 99, (2, 8, 7))
    model = create(name.rpartition('For')[0] + 'Config', name, backbone, levels, kwargs)
    outputs = check_uses(
        model, inputs, targets, ['logits'] if is_semantic else ['class_queries_logits', 'masks_queries_logits'],
        tmp_path)
    for found in processor.post_process_semantic_segmentation(outputs, target_sizes=[(427, 640)] * 2):
        assert found.shape == (427, 640) and 0 <= found.min() and found.max() < NUM_LABELS


def test_backbone_is_built_by_name(hub):
    """Asked by name, transformers looks on the Hub first; there is no such repository."""
    config = transformers.DetrConfig(
        backbone='fast_itpn_tiny_fpn', use_timm_backbone=True, backbone_kwargs=dict(out_indices=[2]), **DETR)
    model = transformers.DetrForObjectDetection(config).eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 90, 130)).logits.isfinite().all()


def test_backbone_takes_arguments_from_a_folder(photos, tmp_path):
    """A config has no place for them: here for the channels of the authors' segmentation."""
    folder = tmp_path / 'itpn_tiny_fpn'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(dict(
        architecture='itpn_tiny_fpn', pretrained_cfg={}, model_args=dict(pyramid_concat=True))))
    name, levels = 'UperNetForSemanticSegmentation', [0, 1, 2, 3]
    kwargs = dict(SEGMENTERS[name][2], auxiliary_in_channels=256 + 64)
    model = create('UperNetConfig', name, f'local-dir:{folder}', levels, kwargs)
    assert model.backbone.channels == [256 + 16, 256 + 32, 256 + 64, 256 + 64]
    maps = [np.tile(np.arange(640, dtype=np.uint8) % NUM_LABELS, (427, 1)) for _ in photos]
    processor = transformers.SegformerImageProcessor(size=dict(height=100, width=150))
    inputs = processor(photos, segmentation_maps=maps, return_tensors='pt')
    targets = dict(labels=inputs.pop('labels'))
    check_uses(model, inputs, targets, ['logits'], tmp_path / 'model')


@pytest.mark.parametrize('size', SIZES_IN_PIXELS)
@pytest.mark.parametrize('backbone', BACKBONES)
def test_maps_have_the_sizes_of_a_convolutional_backbone(backbone, size):
    model = timm.create_model(backbone, features_only=True, pyramid_dim=32).eval()
    x = torch.randn(1, 3, *size)
    with torch.inference_mode():
        for ours, reduction in zip(model(x), model.feature_info.reduction()):
            assert ours.shape[2:] == (-(-size[0] // reduction), -(-size[1] // reduction))

"""Our models inside transformers, as backbones and as classifiers, against timm itself."""
import io
import json

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from support import golden
from support.small import official_weights
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf

from timm_itpn.cli import main

transformers = pytest.importorskip('transformers', reason='transformers is not installed')

SMALL = dict(embed_dim=128, depths=(1, 1, 2), num_heads=2)


@pytest.fixture(scope='module')
def photo():
    return Image.fromarray(load_sample_images().images[0])


def assert_same_features(backbone, extractor, size):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        maps, expected = backbone(x).feature_maps, extractor(x)
    assert len(maps) == len(expected) and backbone.channels == [level.shape[1] for level in expected]
    for level, wanted in zip(maps, expected):
        assert torch.equal(level, wanted)


# backbones

@pytest.mark.parametrize('name, out_indices, out_features', [
    ('fast_itpn_tiny', None, ['stages.2']),
    ('fast_itpn_tiny', [0, 1, 2], ['stages.0', 'stages.1', 'stages.2']),
    ('itpn_tiny', [1, 2], ['stages.1', 'stages.2']),
    ('fast_itpn_tiny_fpn', None, ['pyramid.pools.1']),
    ('fast_itpn_tiny_fpn', [0, 1, 2, 3], [*(f'pyramid.levels.{i}' for i in range(3)), 'pyramid.pools.0']),
])
def test_backbone_of_a_config_gives_the_features_of_timm(name, out_indices, out_features):
    config = transformers.TimmBackboneConfig(backbone=name, out_indices=out_indices)
    torch.manual_seed(0)
    backbone = transformers.TimmBackbone(config, **SMALL).eval()
    assert backbone.out_features == out_features
    torch.manual_seed(0)  # for the same weights
    extractor = timm.create_model(
        name, features_only=True, out_indices=out_indices or [-1], **SMALL).eval()
    assert_same_features(backbone, extractor, (64, 96))


def test_pretrained_backbone_gives_the_features_of_timm(hub, small_models):
    name, out_indices = 'fast_itpn_tiny_fpn', (0, 1, 2, 3, 4)
    buffer = io.BytesIO()
    torch.save(official_weights(num_classes=0, pyramid=True), buffer)
    hub.commit('xche32/RELO', {'pretrained/itpn/fast_itpn_tiny_1600e_1k.pt': buffer.getvalue()})
    backbone = transformers.AutoBackbone.from_pretrained(
        name, use_timm_backbone=True, out_indices=out_indices).eval()
    extractor = timm.create_model(
        name, pretrained=True, features_only=True, out_indices=out_indices).eval()
    assert_same_features(backbone, extractor, (64, 96))


# classifiers

@pytest.fixture(params=['fast_itpn_tiny', 'itpn_tiny'])
def classifier(request):
    """A classifier of 7 classes for 96 pixels, with logits and relative position bias that are not nearly zero."""
    torch.manual_seed(0)
    model = timm.create_model(request.param, num_classes=7, img_size=96, head_init_scale=1., **SMALL).eval()
    tables = [p for name, p in model.named_parameters() if name.endswith('relative_position_bias_table')]
    assert len(tables) == (2 if request.param == 'itpn_tiny' else 0)
    for table in tables:
        torch.nn.init.normal_(table)
    return model


def save(model, folder, for_transformers=True):
    save_for_hf(model, folder, safe_serialization=True)
    if for_transformers:
        path = folder / 'config.json'
        config = json.loads(path.read_text())
        del config['model_args']['num_classes']  # test_num_classes_in_model_args_is_still_refused
        path.write_text(json.dumps(config))


def test_classifier_gives_the_logits_of_timm(classifier, photo, tmp_path):
    save(classifier, tmp_path)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(model) is transformers.TimmWrapperForImageClassification
    inputs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(photo, return_tensors='pt')
    reloaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = create_transform(**resolve_data_config(model=reloaded))(photo)[None]
    assert x.shape == (1, 3, 96, 96)
    torch.testing.assert_close(inputs['pixel_values'], x)
    with torch.inference_mode():
        logits = model(**inputs).logits
        assert logits.std() > 0.05
        torch.testing.assert_close(logits, classifier(x))
        torch.testing.assert_close(logits, reloaded(x))


def test_classifier_trains(classifier, photo, tmp_path):
    save(classifier, tmp_path)
    model = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path).train()
    model.gradient_checkpointing_enable()
    assert model.timm_model.grad_checkpointing
    inputs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(photo, return_tensors='pt')
    model(**inputs, labels=torch.tensor([3])).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_features_of_a_saved_classifier_are_those_of_timm(classifier, photo, tmp_path):
    save(classifier, tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path)
    inputs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(photo, return_tensors='pt')
    with torch.inference_mode():
        outputs = model(**inputs, output_hidden_states=True)
        final, stages = classifier.forward_intermediates(inputs['pixel_values'])
        torch.testing.assert_close(outputs.last_hidden_state, final)
        torch.testing.assert_close(outputs.pooler_output, classifier.forward_head(final, pre_logits=True))
        for state, stage in zip(outputs.hidden_states, stages):
            torch.testing.assert_close(state, stage)


def test_num_classes_in_model_args_is_still_refused(classifier, tmp_path):
    """timm 1.0.31 writes them, transformers 5.23 cannot take them, whatever the model."""
    save(classifier, tmp_path, for_transformers=False)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'num_classes'"):
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize('name', ['fast_itpn_tiny', 'fast_itpn_tiny_mim'])
def test_converted_folder_loads(name, tmp_path):
    expected = golden.load(name)
    torch.save({'model': golden.official_state_dict(expected, torch.float32)}, tmp_path / 'w.pt')
    assert main(['convert', str(tmp_path / 'w.pt'), '-o', str(tmp_path / 'out')]) == 0
    image = golden.image(expected, torch.float32)
    with torch.inference_mode():
        if name == 'fast_itpn_tiny':
            model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'out')
            assert golden.error(model(image).logits, expected['logits']) < 1e-4
        else:  # pyramid and decoder are left out, transformers warns of it
            model = transformers.AutoModel.from_pretrained(tmp_path / 'out')
            ours = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
            torch.testing.assert_close(model(image).last_hidden_state, ours.forward_features(image))


def test_trainer_and_pipeline_take_a_converted_folder(classifier, photo, tmp_path):
    args = dict(model=classifier.pretrained_cfg['architecture'], model_kwargs=SMALL)  # as timm's train.py leaves them
    torch.save({'state_dict': classifier.state_dict(), 'args': args}, tmp_path / 'w.pt')
    assert main(['convert', str(tmp_path / 'w.pt'), '-o', str(tmp_path / 'out')]) == 0
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'out')
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / 'out')
    samples = [dict(pixel_values=processor(photo, return_tensors='pt')['pixel_values'][0], labels=i) for i in range(4)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / 'run'), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True)
    trainer = transformers.Trainer(model, arguments, train_dataset=samples)
    assert trainer.train().training_loss > 0
    trainer.save_model(str(tmp_path / 'trained'))
    classify = transformers.pipeline(
        'image-classification', model=str(tmp_path / 'trained'), image_processor=processor)
    found = classify(photo, top_k=7)
    with torch.inference_mode():
        expected = trainer.model(**processor(photo, return_tensors='pt')).logits.softmax(dim=-1)[0]
    torch.testing.assert_close(torch.tensor([each['score'] for each in found]), expected.sort(descending=True).values)

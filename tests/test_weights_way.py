"""The whole way of a weight file, for every model: official checkpoint, converted and verified folder, model, the
Hub, model from there, official checkpoint again. Weights follow the goldens' formula; the same outputs everywhere.

Each goes at reduced size, as if it were registered so; one at full size too, compared with its golden.
"""
import argparse

import pytest
import timm
import torch
from support import golden
from support.small import reduce_models

from timm_itpn.cli import main
from timm_itpn.models import MODULES
from timm_itpn.weights.layout import native_to_official

FULL_SIZE, GOLDEN = 'fast_itpn_tiny_fpn', 'fast_itpn_tiny_mim'
NAMES = [
    *timm.list_models(module=MODULES),
    'itpn_base.clip_in1k', 'itpn_base_fpn.pixel_in1k',
]
CASES = [*((name, 'float16', True) for name in NAMES), (FULL_SIZE, 'float32', False)]


def published(name, dtype, reduced):
    """Checkpoint as the official code writes it, and its golden, None if there is none."""
    if not reduced:
        expected = golden.load(GOLDEN)
        keys = expected['keys']
    else:
        expected = None
        num_classes = timm.get_pretrained_cfg(name).num_classes if '.' in name else 1000
        model = timm.create_model(
            name, device='meta', num_classes=num_classes, pyramid='_fpn' in name or not num_classes)
        native = {key: value for key, value in model.state_dict().items() if num_classes or key[:5] != 'head.'}
        keys = [(key, value.shape) for key, value in native_to_official(native).items()]
    weights = {key: golden.tensor(key, shape).to(getattr(torch, dtype)) for key, shape in keys}
    moments = {key: {'exp_avg': torch.zeros_like(value)} for key, value in weights.items()}
    checkpoint = {'model': weights, 'optimizer': {'state': moments}, 'epoch': 0, 'args': argparse.Namespace(lr=1e-4)}
    return checkpoint, expected


def outputs(model, expected):
    """Levels of the pyramid if there is one, logits else."""
    image = golden.image(expected or {'input': ('image', (1, 3, 224, 224))}, torch.float32)
    with torch.inference_mode():
        result = model.eval()(image)
    return result if isinstance(result, list) else [result]


def check(model, expected, reference):
    """Outputs are those of the reference, which are the golden ones."""
    result = outputs(model, expected)
    if reference is not None:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(result, reference))
    if expected is not None:
        summaries = expected['pyramid_clean'].values()
        for ours, summary in zip(result, sorted(summaries, key=lambda s: -s['shape'][-1])):
            assert golden.error(ours, summary) < 1e-4
    return result


@pytest.mark.usefixtures('one_thread')
@pytest.mark.parametrize('name, dtype, reduced', CASES)
def test_outputs_are_the_same_all_the_way(name, dtype, reduced, hub, tmp_path, monkeypatch):
    arch = name.partition('.')[0]
    if reduced:
        reduce_models(timm.list_models(module=MODULES), monkeypatch)
    checkpoint, expected = published(name, dtype, reduced)
    torch.save(checkpoint, tmp_path / 'w.pt')
    args = dict(features_only=True) if arch.endswith('_fpn') else {}

    assert main(['convert', str(tmp_path / 'w.pt'), '--model', name, '-o', str(tmp_path / 'out'), '--verify']) == 0
    local = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True, **args)
    reference = check(local, expected, None)
    del local

    hub.commit('someone/model', {path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir()})
    uploaded = timm.create_model('hf-hub:someone/model', pretrained=True, cache_dir=tmp_path / 'cache', **args)
    check(uploaded, expected, reference)
    del uploaded

    assert main(['convert', str(tmp_path / 'out'), '--reverse', '-o', str(tmp_path / 'back.pt'), '--verify']) == 0
    back = torch.load(tmp_path / 'back.pt', mmap=True)['model']
    assert set(back) == set(checkpoint['model'])
    assert all(torch.equal(back[key], value) for key, value in checkpoint['model'].items())
    overlay = dict(file=str(tmp_path / 'back.pt'), num_classes=1000 if 'head.weight' in back else 0)
    again = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=overlay['num_classes'], **args)
    check(again, expected, reference)

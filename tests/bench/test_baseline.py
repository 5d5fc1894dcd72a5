"""The baseline computes what the official models compute."""
import pytest
import torch
from support import golden

from timm_itpn.bench.baseline import Baseline
from timm_itpn.layers.pyramid import FeaturePyramid

ARGS = {
    'tiny': dict(embed_dim=384, depths=(1, 1, 12), num_heads=6),
    'small': dict(embed_dim=384, depths=(2, 2, 20), num_heads=6),
    'base': dict(embed_dim=512, depths=(3, 3, 24), num_heads=8),
}


@pytest.mark.parametrize('variant', ARGS)
def test_official_values_hold(variant):
    expected = golden.load(f'fast_itpn_{variant}')
    model = Baseline(**ARGS[variant]).double().eval()
    model.load_state_dict(golden.official_state_dict(expected))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected['params']
    with torch.inference_mode():
        assert golden.error(model(golden.image(expected)), expected['logits']) < 2e-7


@pytest.mark.parametrize('with_pyramid', [False, True])
def test_gradient_checkpointing_changes_no_gradient(with_pyramid, one_thread):
    torch.manual_seed(0)
    pyramid = FeaturePyramid((32, 64, 128), dim=16) if with_pyramid else None
    model = Baseline((32, 48), num_classes=5, embed_dim=128, depths=(1, 1, 2), num_heads=2, pyramid=pyramid).double()
    images, gradients = torch.randn(2, 3, 32, 48, dtype=torch.float64), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        outputs = model(images)
        sum(output.square().sum() for output in (outputs if with_pyramid else [outputs])).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])

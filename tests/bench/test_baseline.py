"""The baseline computes what the official models compute."""
import torch
from support import golden

from timm_itpn.bench.baseline import Baseline


def test_official_values_hold():
    expected = golden.load('fast_itpn_small')
    model = Baseline(embed_dim=384, depths=(2, 2, 20), num_heads=6).double().eval()
    model.load_state_dict(golden.official_state_dict(expected))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected['params']
    with torch.inference_mode():
        assert golden.error(model(golden.image(expected)), expected['logits']) < 2e-7

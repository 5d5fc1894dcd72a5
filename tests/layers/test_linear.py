"""Linear layers run on the implementation of their device, and whatever is done to them is honoured."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from support.small import Adapter

from timm_itpn.layers.linear import apply_linear, linear
from timm_itpn.layers.mlp import GatedMlp
from timm_itpn.ops.linear import onednn_grad

x = torch.linspace(-1, 1, 2 * 150 * 96).reshape(2, 150, 96)


@pytest.fixture
def calls(monkeypatch):
    """Shapes that oneDNN is called with, on any CPU."""
    shapes = []

    def forward(x, *args):
        shapes.append(tuple(x.shape))
        return F.linear(x, *args)

    monkeypatch.setattr(onednn_grad, 'why_not_here', lambda: None)
    monkeypatch.setattr(onednn_grad, 'forward', forward)
    return shapes


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(96, 192)


def test_plain_layer_is_computed_by_onednn(calls, layer):
    torch.testing.assert_close(apply_linear(layer, x), layer(x))
    torch.testing.assert_close(linear(x, layer.weight), F.linear(x, layer.weight))
    assert len(calls) == 2


def test_other_types_and_autocast_are_left_to_pytorch(calls, layer):
    with torch.autocast('cpu', torch.bfloat16):
        assert apply_linear(layer, x).dtype == torch.bfloat16
    assert apply_linear(copy.deepcopy(layer).double(), x.double()).dtype == torch.float64
    assert apply_linear(copy.deepcopy(layer).to('meta'), x.to('meta')).is_meta
    assert not calls


def test_what_stands_in_for_the_layer_is_called(calls, layer):
    hooked = copy.deepcopy(layer)
    hooked.register_forward_hook(lambda module, args, output: output + 1.)
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, torch.qint8)[0]
    torch.testing.assert_close(apply_linear(Adapter(layer), x), layer(x) + 1.)
    torch.testing.assert_close(apply_linear(hooked, x), layer(x) + 1.)
    torch.testing.assert_close(apply_linear(quantised, x), layer(x), rtol=0., atol=0.1)
    assert not calls


def test_weights_of_another_class_are_left_to_pytorch(calls, layer):
    class Sharded(torch.Tensor):
        pass

    linear(x, layer.weight.detach().as_subclass(Sharded), layer.bias)
    assert not calls


@pytest.mark.parametrize('name', ['fast_itpn_tiny_fpn', 'itpn_base_fpn'])
def test_every_linear_layer_of_a_model_goes_that_way(calls, name):
    model = timm.create_model(name, img_size=32).eval()
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    num_linear = sum(type(module) is nn.Linear for module in model.modules())
    num_gated = sum(type(module) is GatedMlp for module in model.modules())
    assert len(calls) == num_linear + num_gated  # gate and value are two products

"""The gated MLP is timm's, whichever way its first product is done, and whatever stands in for its first layer."""
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support.small import Adapter
from timm.layers import GluMlp

from timm_itpn.layers.mlp import GatedMlp, GatedProduct


def pair(**kwargs):
    """Ours and timm's, with the same weights."""
    torch.manual_seed(0)
    ours = GatedMlp(16, 48, act_layer=nn.SiLU, norm_layer=nn.LayerNorm, **kwargs)
    theirs = GluMlp(16, 48, act_layer=nn.SiLU, norm_layer=nn.LayerNorm, gate_last=False, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_timm(dtype):
    results = []
    for mlp in pair():
        mlp.to(dtype)
        x = torch.linspace(-2, 2, 2 * 5 * 16).reshape(2, 5, 16).to(dtype).requires_grad_()
        out = mlp(x)
        out.float().square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in mlp.parameters())])
    torch.testing.assert_close(*results)


def test_product_can_be_differentiated_twice_and_mapped():
    gate, value = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in 'gv')
    assert torch.autograd.gradcheck(GatedProduct.apply, (gate, value))
    assert torch.autograd.gradgradcheck(GatedProduct.apply, (gate, value))
    mapped = torch.func.vmap(torch.func.grad(lambda g, v: GatedProduct.apply(g, v).sum()))(gate, value)
    torch.testing.assert_close(mapped, torch.autograd.grad((F.silu(gate) * value).sum(), gate)[0])


def test_float32_on_the_cpu_is_split():
    ours, _ = pair()
    x = torch.randn(2, 16)
    assert ours._is_split(x) and not ours._is_split(x.bfloat16()) and not ours._is_split(x.to('meta'))
    with torch.autocast('cpu', torch.bfloat16):
        assert not ours._is_split(x)


def test_what_stands_in_for_the_first_layer_is_used():
    x = torch.randn(3, 16)
    ours, _ = pair()
    plain = ours(x)
    adapted = copy.deepcopy(ours)
    adapted.fc1 = Adapter(adapted.fc1)
    hooked = copy.deepcopy(ours)
    hooked.fc1.register_forward_hook(lambda module, args, output: output + 1.)
    torch.testing.assert_close(adapted(x), hooked(x))
    assert not torch.allclose(adapted(x), plain)


def test_hook_of_the_activation_is_called():
    ours, _ = pair()
    seen = []
    ours.act.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    ours(torch.randn(3, 16))
    assert seen == [(3, 24)]

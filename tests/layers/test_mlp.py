"""The gated MLP is timm's, with less memory and all derivatives."""
import pytest
import timm.layers
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_itpn.layers.mlp import GatedProduct, GatedSiLU, SwiGLU


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_timm(dtype):
    torch.manual_seed(0)
    ours, theirs = (layer(16, 48, norm_layer=nn.LayerNorm) for layer in (SwiGLU, timm.layers.SwiGLU))
    theirs.load_state_dict(ours.state_dict())
    results = []
    for mlp in (ours, theirs):
        mlp.to(dtype)
        x = torch.linspace(-2, 2, 2 * 5 * 16).reshape(2, 5, 16).to(dtype).requires_grad_()
        out = mlp(x)
        out.float().square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in mlp.parameters())])
    torch.testing.assert_close(*results)


def test_product_has_all_derivatives():
    inputs = tuple(torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in 'gv')
    assert torch.autograd.gradcheck(GatedProduct.apply, inputs, check_batched_grad=True)
    assert torch.autograd.gradcheck(GatedSiLU(), inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(GatedSiLU(), inputs)
    mapped = torch.func.vmap(torch.func.grad(lambda g, v: GatedSiLU()(g, v).sum()))(*inputs)
    torch.testing.assert_close(mapped, torch.autograd.grad((F.silu(inputs[0]) * inputs[1]).sum(), inputs[0])[0])

"""Transforms of `torch.func` and forward-mode derivatives, with the attention that models have by default."""
import pytest
import torch
from support.small import images, small_model
from torch import func
from torch.autograd import forward_ad

import timm_itpn

TINY = dict(embed_dim=64, depths=(1, 1, 1), head_init_scale=1.)
ACCELERATED = dict(acceleration='full', gather_window=2, migrate={0: 1})
PYRAMID = dict(features_only=True, pyramid_dim=16)
MODELS = {
    'fast_itpn': ('fast_itpn_tiny', {}),
    'itpn': ('itpn_tiny', dict(init_values=0.1)),
    'hivit': ('hivit_tiny', {}),
    'itpn-dynamic': ('itpn_tiny', dict(img_size=32, dynamic_img_size=True)),
    'fast_itpn-accelerated': ('fast_itpn_tiny', ACCELERATED),
    'itpn-accelerated-dynamic': ('itpn_tiny', dict(ACCELERATED, img_size=32, dynamic_img_size=True)),
    'fast_itpn-pyramid': ('fast_itpn_tiny_fpn', PYRAMID),
    'itpn-pyramid': ('itpn_tiny_fpn', PYRAMID),
}

pytestmark = pytest.mark.usefixtures('one_thread')


def build(case, **kwargs):
    """A model, its weights, and some of its outputs as a function of weights and images."""
    name, arguments = MODELS[case]
    model = small_model(name, **TINY, **arguments, **kwargs)

    def call(weights, x):
        outputs = func.functional_call(model, weights, (x,))
        if isinstance(outputs, list):
            outputs = torch.cat([output.flatten(1)[:, ::97] for output in outputs], dim=1)
        return outputs

    return model, dict(model.named_parameters()), call


def dual(call, weights, x):
    with torch.no_grad(), forward_ad.dual_level():
        return forward_ad.unpack_dual(call(weights, forward_ad.make_dual(x, x.flip(0)))).tangent


def loss(call):
    return lambda weights, x: call(weights, x).square().sum()


def ones_like(weights):
    return {key: torch.ones_like(value) for key, value in weights.items()}


TRANSFORMS = {
    'vjp of images': lambda call, w, x: func.vjp(lambda x: call(w, x), x)[1](torch.ones_like(call(w, x)))[0],
    'vjp of weights': lambda call, w, x: func.vjp(lambda w: call(w, x), w)[1](torch.ones_like(call(w, x)))[0],
    'grad': lambda call, w, x: func.grad(loss(call), argnums=(0, 1))(w, x),
    'grad per sample': lambda call, w, x: func.vmap(func.grad(loss(call)), (None, 0))(w, x[:, None]),
    'jacrev': lambda call, w, x: func.jacrev(lambda x: call(w, x)[:, :2])(x),
    'jacfwd': lambda call, w, x: func.jacfwd(lambda factor: call(w, factor * x))(torch.ones(1, dtype=x.dtype)),
    'jvp': lambda call, w, x: func.jvp(call, (w, x), (ones_like(w), x.flip(0))),
    'dual numbers': dual,
    'hessian times vector': lambda call, w, x: func.jvp(
        func.grad(lambda x: loss(call)(w, x)), (x,), (x.flip(0),)),
    'vmap of images': lambda call, w, x: func.vmap(lambda x: call(w, x[None]))(x),
    'vmap of weights': lambda call, w, x: func.vmap(lambda w: call(w, x))(
        {key: torch.stack((value, -value)) for key, value in w.items()}),
}


@pytest.mark.parametrize('case', MODELS)
def test_transforms_agree_with_plain_maths_in_float64(case):
    _, weights, call = build(case)
    _, exact_weights, exact_call = build(case, attn_impl='reference', dtype=torch.float64)
    for key, value in exact_weights.items():
        value.data.copy_(weights[key])
    x = images(2, 3, 64, 64)
    for name, transform in TRANSFORMS.items():
        actual, expected = transform(call, weights, x), transform(exact_call, exact_weights, x.double())
        leaves = [torch.utils._pytree.tree_leaves(tree) for tree in (actual, expected)]
        for a, e in zip(*leaves, strict=True):
            assert e.any() and (a - e).abs().max() <= 1e-3 * e.abs().max(), name


@pytest.mark.parametrize('case', ['fast_itpn', 'itpn'])
def test_plain_call_after_a_transform_is_as_before(case):
    """A relative position bias that was made inside a transform may be kept."""
    model, _, _ = build(case)
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        before = build(case)[0](x)
        for transform in (lambda: func.jvp(model, (x,), (x,)), lambda: func.vmap(model)(x[:, None])):
            transform()
            torch.testing.assert_close(model(x), before)
    func.vjp(torch.no_grad()(model), x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize('case', ['fast_itpn', 'itpn', 'itpn-accelerated-dynamic'])
def test_fused_copies_have_forward_mode_and_vmap_and_compute_with_the_weights_they_have(case):
    model, weights, call = build(case)
    other, _, _ = build(case, seed=1)
    fused, fused_other = timm_itpn.fuse(model), timm_itpn.fuse(other)
    x = images(2, 3, 64, 64)
    close = dict(rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(func.jvp(fused, (x,), (x,)), func.jvp(model, (x,), (x,)), **close)
        torch.testing.assert_close(
            dual(lambda _, x: fused(x), None, x), dual(lambda _, x: model(x), None, x), **close)
        torch.testing.assert_close(func.vmap(fused)(x[:, None])[:, 0], model(x), **close)
        expected = other(x)
        torch.testing.assert_close(
            func.functional_call(fused, dict(fused_other.named_parameters()), (x,)), expected, **close)
        for parameter, value in zip(fused.parameters(), fused_other.parameters(), strict=True):
            parameter.copy_(value)
        torch.testing.assert_close(fused(x), expected, **close)
    with pytest.raises(RuntimeError, match='A fused model has no gradients'):
        func.vjp(fused, x)
    with pytest.raises(RuntimeError, match='A fused model has no gradients'):
        fused.requires_grad_()(x)

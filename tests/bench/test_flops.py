"""Operations are those that the architecture has, counted by hand; the ceiling follows from times and counts."""
import pytest
import timm
import torch
import torch.nn as nn
from support.small import small_model

from timm_itpn.bench.baseline import Baseline
from timm_itpn.bench.flops import Product, TimedProduct, count_flops, count_products, product_calls, rates

A, B = Product(8, 16, 32), Product(4, 8, 8)


def by_hand(side, embed_dim=512, depths=(3, 3, 24), num_classes=1000, mlp_ratio=3):
    """Operations of Fast-iTPN for one image: of linear and convolution layers, and of attention."""
    c, n = embed_dim, (side // 16) ** 2
    layers = 16 * n * 4 * 4 * 3 * c // 4  # stem
    layers += depths[0] * 16 * n * 2 * mlp_ratio * (c // 4) ** 2  # two products, at stride 4
    layers += 4 * n * 4 * (c // 4) * (c // 2)  # merge of 2 x 2
    layers += depths[1] * 4 * n * 2 * mlp_ratio * (c // 2) ** 2
    layers += n * 4 * (c // 2) * c
    layers += depths[2] * n * (4 + 3 * mlp_ratio) * c ** 2  # q, k, v and projection; gate, value and back
    layers += c * num_classes
    attention = depths[2] * 2 * n * n * c  # scores, and weights times values
    return 2 * layers, 2 * attention


def images(side, batch=1):
    return torch.empty(batch, 3, side, side, device='meta')


def test_count_is_that_by_hand():
    side = 512
    layers, attention = by_hand(side)
    model = timm.create_model('fast_itpn_base', img_size=side, num_classes=1000, device='meta')
    with torch.device('meta'):
        baseline = Baseline((side, side))
    assert count_flops(model, images(side)) == count_flops(baseline, images(side)) == layers + attention
    products = count_products(model, images(side, batch=2))
    assert sum(product.flops * count for product, count in products.items()) == 2 * layers
    n = (side // 16) ** 2
    assert products[Product(2 * n, 1536, 512)] == 24  # out of the MLP
    assert products[Product(2 * 16 * n, 48, 128)] == 1  # stem


def test_count_of_a_real_model_leaves_it_alone():
    model = small_model('fast_itpn_tiny')
    state = {key: value.clone() for key, value in model.state_dict().items()}
    layers, attention = by_hand(64, embed_dim=128, depths=(1, 2, 2), num_classes=5)
    assert count_flops(model, torch.randn(2, 3, 64, 64)) == 2 * (layers + attention)
    stem = 2 * 16 * 16 * 48 * 32  # has no gradient of the images
    assert count_flops(model, torch.randn(1, 3, 64, 64), backward=True) == 3 * (layers + attention) - stem
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_model_that_needs_data_is_counted():
    class Picky(nn.Linear):
        def forward(self, x):
            x = x.flatten(1)
            return super().forward(x if x.sum().item() > 0 else -x)

    model = Picky(3 * 4 * 4, 5)
    assert count_flops(model, torch.randn(2, 3, 4, 4)) == 2 * 2 * 48 * 5
    assert count_flops(model, torch.randn(2, 3, 4, 4), backward=True) == 2 * 2 * 2 * 48 * 5
    assert model.weight.grad is None


@pytest.mark.parametrize('name', ['fast_itpn_tiny', 'itpn_tiny'])
def test_pyramid_is_counted(name):
    plain, pyramid = (small_model(name, features_only=True, pyramid=pyramid) for pyramid in (False, True))
    assert count_flops(pyramid, images(64)) > count_flops(plain, images(64)) > 0
    assert count_flops(pyramid, images(64), backward=True) > 2 * count_flops(pyramid, images(64))
    assert count_products(pyramid, images(64))[Product(256, 32, 256)] > 0  # from stage 1 to the width of the levels


def test_products_of_grouped_convolutions_are_those_of_each_group():
    model = nn.Conv2d(4, 6, 3, groups=2, padding=1)
    assert count_products(model, torch.randn(2, 4, 5, 5)) == {Product(2 * 25, 2 * 9, 3): 2}


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_all_implementations_that_can_run_here_do(dtype):
    calls = product_calls({A: 1, B: 2}, dtype, 'cpu')
    assert {key.product for key in calls if key.implementation == 'mm' and key.repeats > 1} == {A, B}
    for call in calls.values():
        call()


def test_each_product_counts_in_its_fastest_implementation():
    times_ms = {  # of ten calls
        TimedProduct(A, 'mm', 10): [40, 41, 1000], TimedProduct(A, 'packed', 10): [19, 20, 21],
        TimedProduct(B, 'mm', 10): [10], TimedProduct(B, 'packed', 10): [30]}
    flops = 3 * A.flops + B.flops
    assert rates({A: 3, B: 1}, times_ms) == pytest.approx(
        (flops / (3 * 0.002 + 0.001), flops / (3 * 0.0041 + 0.001)))

"""Operations are those that the architecture has, counted by hand."""
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from support.small import PYRAMIDS, small_model

from timm_itpn.bench.baseline import Baseline
from timm_itpn.bench.flops import Product, count_flops, count_products, training_loss


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


def model_of(name, side):
    return timm.create_model(name, img_size=side, num_classes=1000, device='meta')


def test_base_at_224_has_38_gflop():
    assert sum(by_hand(224)) == pytest.approx(38.1e9, rel=0.01)


@pytest.mark.parametrize('side', [224, 512])
def test_count_is_that_by_hand(side):
    expected = sum(by_hand(side))
    assert count_flops(model_of('fast_itpn_base', side), images(side)) == expected
    with torch.device('meta'):
        baseline = Baseline((side, side))
    assert count_flops(baseline, images(side)) == expected


def test_count_of_a_real_model_is_the_same_and_leaves_it_alone():
    model = small_model('fast_itpn_tiny')
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = 2 * sum(by_hand(64, embed_dim=128, depths=(1, 2, 2), num_classes=5))
    assert count_flops(model, torch.randn(2, 3, 64, 64)) == expected
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_backward_pass_counts_twice_but_for_the_gradient_of_the_images():
    layers, attention = by_hand(64, embed_dim=128, depths=(1, 2, 2), num_classes=5)
    stem = 2 * 16 * 16 * 48 * 32
    model = small_model('fast_itpn_tiny')
    assert count_flops(model, torch.randn(1, 3, 64, 64), backward=True) == 3 * (layers + attention) - stem
    assert all(parameter.grad is None for parameter in model.parameters())


def test_model_that_needs_data_is_counted():
    class Picky(nn.Linear):
        def forward(self, x):
            x = x.flatten(1)
            return super().forward(x if x.sum().item() > 0 else -x)

    model = Picky(3 * 4 * 4, 5)
    assert count_flops(model, torch.randn(2, 3, 4, 4)) == 2 * 2 * 48 * 5
    assert count_flops(model, torch.randn(2, 3, 4, 4), backward=True) == 2 * 2 * 2 * 48 * 5
    assert model.weight.grad is None


@pytest.mark.parametrize('name', PYRAMIDS)
def test_pyramid_is_counted(name):
    plain, pyramid = (small_model(name, features_only=True, pyramid=pyramid) for pyramid in (False, True))
    assert count_flops(pyramid, images(64)) > count_flops(plain, images(64)) > 0
    assert count_flops(pyramid, images(64), backward=True) > 2 * count_flops(pyramid, images(64))
    products = count_products(pyramid, images(64))
    assert products[Product(16, 128, 256)] > 0  # what brings stage 3 to the channels of the levels
    assert products[Product(256, 32, 256)] > 0  # and stage 1


def test_loss_follows_from_what_the_outputs_are():
    logits, targets = torch.randn(2, 5), torch.tensor([1, 3])
    assert training_loss(logits.half(), targets) == F.cross_entropy(logits.half().float(), targets)
    maps = [torch.full((2, 3, 4, 4), 2.), torch.full((2, 3, 2, 2), -3., dtype=torch.bfloat16)]
    assert training_loss(maps, targets) == training_loss(tuple(maps), targets) == 4 + 9


@pytest.mark.parametrize('side', [224, 512])
def test_products_are_all_but_attention(side):
    products = count_products(model_of('fast_itpn_base', side), images(side, batch=2))
    assert sum(product.flops * count for product, count in products.items()) == 2 * by_hand(side)[0]
    n = (side // 16) ** 2
    assert products[Product(2 * n, 512, 512)] == 24  # projection
    assert products[Product(2 * n, 1536, 512)] == 24  # out of the MLP
    assert products[Product(2 * 16 * n, 48, 128)] == 1  # stem
    assert products[Product(2, 512, 1000)] == 1


def test_products_of_grouped_convolutions_are_those_of_each_group():
    model = nn.Conv2d(4, 6, 3, groups=2, padding=1)
    assert count_products(model, torch.randn(2, 4, 5, 5)) == {Product(2 * 25, 2 * 9, 3): 2}

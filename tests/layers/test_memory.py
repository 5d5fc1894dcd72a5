"""What training keeps for the backward pass, per image, against the unfused baseline."""
import pytest
import torch
from support.small import images, small_model

from timm_itpn.bench.baseline import Baseline

# the shape of the base model, a quarter as wide and a third as deep: all activations shrink by the same factor
SHAPE = dict(embed_dim=128, depths=(1, 1, 8), num_heads=2)
SIZES = (224, 512)

pytestmark = pytest.mark.usefixtures('one_thread')


def saved_mib(model, size):
    """MiB that one image leaves for the backward pass, weights not counted, memory that is shared counted once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.train()(images(1, 3, size, size))  # noqa: F841  alive, and so all addresses are of now
    return sum(saved.values()) / 2 ** 20


def ours(name, size, **kwargs):
    return small_model(name, img_size=size, **SHAPE, **kwargs)


@pytest.mark.parametrize(('size', 'bound'), list(zip(SIZES, (0.85, 0.65))))
def test_fast_itpn_keeps_less_than_the_baseline(size, bound):
    baseline = saved_mib(Baseline(img_size=(size, size), num_classes=5, **SHAPE), size)
    assert saved_mib(ours('fast_itpn_tiny', size), size) < bound * baseline


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('name', ['fast_itpn_tiny', 'itpn_tiny'])
def test_gradient_checkpointing_keeps_a_fraction(name, size):
    model = ours(name, size)
    keeping = saved_mib(model, size)
    model.set_grad_checkpointing()
    assert saved_mib(model, size) < 0.25 * keeping


@pytest.mark.parametrize('dynamic', [False, True])
def test_relative_position_bias_is_kept_for_the_batch_and_not_for_each_image(dynamic):
    model = ours('itpn_tiny', 224, dynamic_img_size=dynamic)
    plain = ours('itpn_tiny', 224, dynamic_img_size=dynamic, rel_pos_bias=False)
    bias_mib = sum(saved_mib(m, 224) * sign for m, sign in ((model, 1), (plain, -1)))
    elements = 196 * 200 * SHAPE['num_heads']  # of one block's bias; rows are padded to multiples of 8
    assert bias_mib * 2 ** 20 / SHAPE['depths'][2] < 2.5 * 4 * elements  # the bias, and the index for its gradient

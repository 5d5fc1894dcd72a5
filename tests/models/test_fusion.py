"""The fused copy computes what the model does, and says clearly what it is not for."""
import copy
import pickle

import pytest
import torch
import torch.nn as nn
from support.small import FAMILIES, PYRAMIDS, images, small_model
from timm.models import reparameterize_model
from torch.testing._internal.two_tensor import TwoTensor

import timm_itpn
from timm_itpn.layers.fused import FusedLinear
from timm_itpn.tools.convert import convert
from timm_itpn.tools.inspect import inspect
from timm_itpn.weights.layout import native_to_official


def filled(name, **kwargs):
    """A small model in float64 whose norms, biases and layer scales are far from their initial values."""
    model = small_model(name, **{'num_classes': 0, **kwargs}).double()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.3, 0.9)
    return model


def outputs(model, x):
    with torch.no_grad():
        result = model(x)
    return result if isinstance(result, list) else [result]


CASES = [
    *[(name, dict(init_values=init_values)) for name in FAMILIES for init_values in (None, 0.1)],
    *[(name, dict(features_only=True)) for name in (*FAMILIES, *PYRAMIDS)],
    *[(name, dict(act_layer='gelu_tanh')) for name in FAMILIES],
    ('itpn_tiny', dict(dynamic_img_size=True)),
    ('fast_itpn_tiny', dict(norm_layer='rmsnorm')),
    ('fast_itpn_tiny', dict(embed_dim=96)),  # scores are not scaled by a power of two
]


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('name, kwargs', CASES)
def test_outputs_are_those_of_the_model(name, kwargs, dtype):
    model = filled(name, **kwargs)
    x = images(2, 3, 64, 64).double()
    exact = outputs(model, x)
    model = model.to(dtype)
    fused = timm_itpn.fuse(model)
    assert any(isinstance(module, FusedLinear) for module in fused.modules())
    for e, plain, actual in zip(exact, outputs(model, x.to(dtype)), outputs(fused, x.to(dtype)), strict=True):
        bound = 2 * (plain.double() - e).abs().max() + (8 * torch.finfo(dtype).eps + 1e-12) * e.abs().max()
        assert (actual.double() - e).abs().max() <= bound


def test_model_stays_as_it_was():
    model = filled('fast_itpn_tiny')
    before = copy.deepcopy(model.state_dict())
    timm_itpn.fuse(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_timm_fuses_the_same_way():
    model = filled('itpn_tiny').float()
    x = images(1, 3, 64, 64)
    torch.testing.assert_close(
        outputs(reparameterize_model(model), x), outputs(timm_itpn.fuse(model), x), rtol=0, atol=0)


def test_training_is_refused():
    model = filled('fast_itpn_tiny').float()
    with pytest.raises(RuntimeError, match=r'A model in training mode cannot be fused: call model.eval\(\) first'):
        timm_itpn.fuse(model.train())
    fused = timm_itpn.fuse(model.eval())
    with pytest.raises(RuntimeError, match='A fused model is for inference only'):
        fused.train()
    fused.eval()


def test_gradients_are_refused():
    fused = timm_itpn.fuse(filled('fast_itpn_tiny').float())
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    fused(images(1, 3, 64, 64))  # nothing asks for gradients here
    with pytest.raises(RuntimeError, match='A fused model has no gradients'):
        fused(images(1, 3, 64, 64).requires_grad_())


def test_other_models_are_refused():
    with pytest.raises(ValueError, match='Linear has no layers of this package, or they are fused already'):
        timm_itpn.fuse(nn.Linear(2, 2).eval())


def test_adapter_is_refused():
    """Its weight is that of the layer without what it adds."""
    class Adapter(nn.Linear):
        pass

    model = filled('fast_itpn_tiny')
    model.stages[2].blocks[1].attn.proj = Adapter(128, 128).eval()
    with pytest.raises(ValueError, match='Adapter cannot be fused: merge adapters into the Linear layers first'):
        timm_itpn.fuse(model)


def test_weight_of_another_class_is_refused():
    """As those that torchao quantises, or FSDP2 shards."""
    model = filled('fast_itpn_tiny')
    proj = model.stages[2].blocks[1].attn.proj
    proj.weight = nn.Parameter(TwoTensor(proj.weight.detach(), proj.weight.detach()))
    with pytest.raises(ValueError, match='A weight that is a TwoTensor cannot be fused: quantise or shard later'):
        timm_itpn.fuse(model)


def test_stand_in_for_the_biases_of_q_and_v_is_refused():
    model = filled('fast_itpn_tiny')
    attn = model.stages[2].blocks[1].attn
    attn.qkv_bias = nn.Sequential(attn.qkv_bias).eval()
    with pytest.raises(ValueError, match='Sequential cannot be fused: put the biases of q and v back first'):
        timm_itpn.fuse(model)


def test_weights_are_packed_anew_when_they_change():
    first, second = filled('fast_itpn_tiny').float(), small_model('fast_itpn_tiny', seed=1, num_classes=0)
    x = images(1, 3, 64, 64)
    fused = timm_itpn.fuse(first)
    fused.load_state_dict(timm_itpn.fuse(second).state_dict())
    torch.testing.assert_close(outputs(fused, x), outputs(second, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs(pickle.loads(pickle.dumps(fused)), x), outputs(fused, x), rtol=0, atol=0)
    lower = copy.deepcopy(fused).bfloat16()
    torch.testing.assert_close(
        outputs(lower, x.bfloat16()), outputs(second.bfloat16(), x.bfloat16()), rtol=0.1, atol=0.1)


def test_weights_in_the_memory_of_old_ones_are_packed_anew():
    layer = FusedLinear(torch.zeros(64, 64), None)
    for value in range(1, 9):
        layer.weight.data = torch.empty(0)  # frees the memory, which the next ones of this size get
        layer.weight.data = torch.full((64, 64), float(value))
        assert layer(torch.ones(1, 64)).unique().tolist() == [64 * value]


@torch.inference_mode()
def test_weights_made_in_inference_mode_may_change():
    fused, other = (timm_itpn.fuse(small_model('fast_itpn_tiny', seed=seed)) for seed in (0, 1))
    x = images(1, 3, 64, 64)
    fused(x)
    fused.load_state_dict(other.state_dict())
    torch.testing.assert_close(fused(x), other(x))


def test_autocast_is_obeyed():
    model = filled('fast_itpn_tiny').float()
    x = images(1, 3, 64, 64)
    exact = outputs(model, x)
    with torch.autocast('cpu', torch.bfloat16):
        plain, actual = outputs(model, x), outputs(timm_itpn.fuse(model), x)
    assert 0 < (actual[0] - exact[0]).abs().max() <= 3 * (plain[0] - exact[0]).abs().max()


@pytest.mark.parametrize('name', FAMILIES)
def test_fused_model_compiles_without_breaks(name):
    fused = timm_itpn.fuse(filled(name).float())
    x = images(1, 3, 64, 64)
    compiled = torch.compile(fused, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(outputs(compiled, x), outputs(fused, x), rtol=1e-4, atol=1e-5)


def test_size_and_classifier_can_still_change():
    model = filled('itpn_tiny', num_classes=5).float()
    fused = timm_itpn.fuse(model)
    for each in (model, fused):
        each.set_input_size((64, 96))
        each.reset_classifier(0)
    x = images(1, 3, 64, 96)
    torch.testing.assert_close(outputs(fused, x), outputs(model, x), rtol=1e-4, atol=1e-5)


# files

TINY = dict(embed_dim=64, depths=(1, 1, 1))
OF_A_COPY = 'These weights are of a fused copy .* save the state dict of the model that it was made from'
WAYS = {
    'load_state_dict': lambda name, path: small_model(name, **TINY).load_state_dict(torch.load(path)),
    'strict=False': lambda name, path: small_model(name, **TINY).load_state_dict(torch.load(path), strict=False),
    'a parent': lambda name, path: nn.ModuleList([small_model(name, **TINY)]).load_state_dict(
        {f'0.{key}': value for key, value in torch.load(path).items()}),
    'checkpoint_path': lambda name, path: small_model(name, checkpoint_path=path, **TINY),
    'pretrained': lambda name, path: small_model(
        name, pretrained=True, pretrained_cfg_overlay=dict(file=path), **TINY),
    'convert': lambda name, path: convert(path, path.parent / 'folder'),
}


@pytest.mark.parametrize('pyramid', [False, True])
@pytest.mark.parametrize('name', FAMILIES)
def test_weights_of_a_copy_say_so_wherever_they_are_loaded(name, pyramid, tmp_path):
    path = tmp_path / 'fused.pt'
    torch.save(timm_itpn.fuse(small_model(name, pyramid=pyramid, **TINY)).state_dict(), path)
    for way in WAYS.values():
        with pytest.raises(ValueError, match=OF_A_COPY):
            way(name, path)
    assert inspect(path)['problem'].startswith('These weights are of a fused copy')


@pytest.mark.parametrize('name', FAMILIES)
def test_weights_of_a_model_are_refused_by_a_copy(name):
    model = small_model(name, **TINY)
    fused = timm_itpn.fuse(model)
    for weights in (model.state_dict(), native_to_official(model.state_dict())):
        with pytest.raises(ValueError, match='The model is a fused copy: load these weights into a plain model'):
            fused.load_state_dict(weights)
    fused.load_state_dict({'stages.2.pos_embed': model.stages[2].pos_embed}, strict=False)

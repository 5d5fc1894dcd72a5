"""A model needs nothing but its arguments and its state dict, and computes with the weights it has now."""
import copy
import pickle

import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
from support.small import PYRAMIDS, images, official_weights, small_model
from timm.models import load_checkpoint
from timm.utils import ModelEmaV3

from timm_itpn.weights.layout import native_to_official

TINY = dict(embed_dim=64, depths=(1, 1, 2), head_init_scale=1.)
CASES = {
    'fast_itpn': ('fast_itpn_tiny', {}),
    'itpn': ('itpn_tiny', dict(init_values=0.1)),
    'fast_itpn-accelerated': ('fast_itpn_tiny', dict(acceleration='full', gather_window=2)),
    'fast_itpn-pyramid': ('fast_itpn_tiny_fpn', dict(pyramid=True)),
}

pytestmark = pytest.mark.usefixtures('one_thread')


def build(case, **kwargs):
    name, arguments = CASES[case]
    return small_model(name, **TINY, **arguments, **kwargs)


def output(model, x=None):
    with torch.no_grad():
        return model(images(2, 3, 64, 64) if x is None else x)


# nothing beside the state dict

@pytest.mark.parametrize('name', timm.list_models(module='itpn'))
def test_no_buffer_is_missing_in_the_state_dict(name):
    for kwargs in ({}, dict(acceleration='full')):
        model = timm.create_model(name, device='meta', depths=(1, 1, 2), **kwargs)
        assert {key for key, _ in model.named_buffers()} <= set(model.state_dict())


def load_in_place(case, model, tmp_path):
    twin = build(case, seed=1)
    twin.load_state_dict(model.state_dict())
    return twin


def assign_to_meta(case, model, tmp_path):
    twin = build(case, device='meta')
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin


def load_into_empty(case, model, tmp_path):
    twin = build(case, device='meta').to_empty(device='cpu')
    for parameter in twin.parameters():
        parameter.data.fill_(torch.nan)
    twin.load_state_dict(model.state_dict())
    return twin


def load_pickle(case, model, tmp_path):
    return pickle.loads(pickle.dumps(model))


def load_whole_model(case, model, tmp_path):
    torch.save(model, tmp_path / 'model.pt')
    return torch.load(tmp_path / 'model.pt', weights_only=False)


def load_safetensors(case, model, tmp_path):
    safetensors.torch.save_model(model, tmp_path / 'model.safetensors')
    twin = build(case, seed=1)
    safetensors.torch.load_model(twin, tmp_path / 'model.safetensors')
    return twin


def load_old_names(case, model, tmp_path):
    """Those of before 0.1: q_bias and v_bias beside qkv, gate and value in one layer."""
    old = {key.replace('qkv_bias.', ''): value
           for key, value in model.state_dict().items()}
    for key in [key for key in old if '.fc1_g.' in key]:
        old[key.replace('fc1_g', 'fc1')] = torch.cat((old.pop(key), old.pop(key.replace('fc1_g', 'fc1_x'))))
    twin = build(case, seed=1)
    twin.load_state_dict(old)
    load_checkpoint(twin, _saved(old, tmp_path))
    return twin


def load_by_parent(case, model, tmp_path):
    state_dict = nn.ModuleDict(dict(body=model)).state_dict()
    twin = build(case, seed=1)
    nn.ModuleDict(dict(body=twin)).load_state_dict(state_dict)
    return twin


def _saved(state_dict, tmp_path):
    torch.save(state_dict, tmp_path / 'w.pt')
    return str(tmp_path / 'w.pt')


@pytest.mark.parametrize('way', [
    load_in_place, assign_to_meta, load_into_empty, load_pickle, load_whole_model, load_safetensors, load_old_names,
    load_by_parent, lambda case, model, tmp_path: copy.deepcopy(model),
], ids=lambda way: way.__name__.replace('<lambda>', 'deepcopy'))
@pytest.mark.parametrize('case', CASES)
def test_every_way_of_loading_gives_the_same_outputs(case, way, tmp_path):
    model = build(case)
    expected = output(model)
    assert torch.equal(output(way(case, model, tmp_path).eval()), expected)


# what is in a file and what is not

def pretraining_file():
    return official_weights(num_classes=0, pyramid=True)


def test_pretraining_file_loads_without_strict_and_names_what_differs(tmp_path, small_models):
    model = timm.create_model('fast_itpn_tiny', num_classes=5)
    for result in (
            model.load_state_dict(pretraining_file(), strict=False),
            model.load_state_dict({'model': pretraining_file(), 'epoch': 3}, strict=False),
            load_checkpoint(model, _saved(pretraining_file(), tmp_path), strict=False),
    ):
        assert result.missing_keys == ['head.norm.weight', 'head.norm.bias', 'head.fc.weight', 'head.fc.bias']
        assert result.unexpected_keys == []
    assert torch.equal(model.stages[2].blocks[1].ls1.gamma, pretraining_file()['blocks.6.gamma_1'])
    result = model.load_state_dict({**pretraining_file(), 'extra': torch.zeros(1)}, strict=False)
    assert result.unexpected_keys == ['extra']
    with pytest.raises(ValueError, match='no classifier: load it with strict=False'):
        model.load_state_dict(pretraining_file())


def below_a_prefix(case, **changed):
    """A model, another one in a parent, and a state dict for that parent in which it has official names."""
    model, parent = build(case), nn.Module()
    parent.backbone, parent.neck = build(case, seed=1), nn.Linear(2, 2)
    official = {**native_to_official(model.state_dict()), **changed}
    state_dict = {f'backbone.{key}': value for key, value in official.items() if value is not None}
    return model, parent, {**state_dict, **{f'neck.{key}': value for key, value in parent.neck.state_dict().items()}}


@pytest.mark.parametrize('strict', [False, True])
@pytest.mark.parametrize('case', CASES)
def test_official_names_below_a_prefix_are_converted(case, strict):
    model, parent, state_dict = below_a_prefix(case)
    keys = set(state_dict)
    result = parent.load_state_dict(state_dict, strict=strict)
    assert (result.missing_keys, result.unexpected_keys) == ([], []) and set(state_dict) == keys
    torch.testing.assert_close(parent.backbone.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_incomplete_official_names_below_a_prefix_are_reported():
    _, parent, state_dict = below_a_prefix(
        'fast_itpn', **{'blocks.4.attn.proj.weight': None, 'extra': torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r'Missing key.*backbone\.stages\.2\.blocks\.0\.attn\.proj\.weight'):
        parent.load_state_dict(state_dict)
    result = parent.load_state_dict(state_dict, strict=False)
    assert result.missing_keys == ['backbone.stages.2.blocks.0.attn.proj.weight']
    assert result.unexpected_keys == ['backbone.extra']


def test_grid_that_could_be_one_of_two_is_told(tmp_path, caplog):
    """196 tokens are 14 x 14, as of the published files, or 7 x 28, as of this model."""
    kwargs = dict(TINY, img_size=(112, 448), pretrained=True)
    model = small_model('fast_itpn_tiny', **{**kwargs, 'pretrained': False})
    overlay = dict(file=_saved(model.state_dict(), tmp_path), num_classes=5)
    small_model('fast_itpn_tiny', pretrained_cfg_overlay=overlay, **kwargs)
    assert 'The position embedding is taken for 14 x 14 tokens, not 7 x 28 as in the model' in caplog.text
    caplog.clear()
    twin = small_model('fast_itpn_tiny', pretrained_cfg_overlay={**overlay, 'input_size': (3, 112, 448)}, **kwargs)
    assert torch.equal(twin.stages[2].pos_embed, model.stages[2].pos_embed) and not caplog.text


# the relative position bias that is kept in evaluation on CPUs

def by_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def by_inference_mode(model):
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def by_vector(model):
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(1.5 * vector, model.parameters())


def by_average(model):
    teacher = ModelEmaV3(model, decay=0.5)
    teacher.module = model
    teacher.update(small_model('itpn_tiny', seed=1, **TINY))


def by_optimizer(model):
    model(images(2, 3, 64, 64)).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.).step()


def by_load_state_dict(model):
    model.load_state_dict(small_model('itpn_tiny', seed=1, **TINY).state_dict())


def by_assigning(model):
    model.load_state_dict(small_model('itpn_tiny', seed=1, **TINY).state_dict(), assign=True)


def by_new_parameter(model):
    for block in model.stages[2].blocks:
        table = block.rel_pos_bias.relative_position_bias_table
        block.rel_pos_bias.relative_position_bias_table = nn.Parameter(torch.randn_like(table))


def by_numpy(model):
    for block in model.stages[2].blocks:
        block.rel_pos_bias.relative_position_bias_table.detach().numpy()[:] += 1.5 * torch.randn(1).item()
        block.rel_pos_bias.relative_position_bias_table.detach().numpy()[3] += 1.5


@pytest.mark.parametrize('change', [
    by_data, by_inference_mode, by_vector, by_average, by_optimizer, by_load_state_dict, by_assigning,
    by_new_parameter, by_numpy], ids=lambda change: change.__name__)
def test_outputs_are_of_the_weights_that_the_model_has(change):
    model = small_model('itpn_tiny', **TINY)
    before = output(model)
    assert torch.equal(output(model), before)
    change(model)
    after = output(model)
    assert not torch.allclose(after, before)
    assert torch.equal(after, output(pickle.loads(pickle.dumps(model))))
    with torch.inference_mode():
        torch.testing.assert_close(model(images(2, 3, 64, 64)), after)
    assert model.double()(images(2, 3, 64, 64).double()).dtype == torch.float64


@pytest.mark.parametrize('name', PYRAMIDS)
def test_saved_backbone_comes_back_with_its_pyramid(name, tmp_path):
    model = small_model(name, pyramid=True)
    timm.models.save_for_hf(model, tmp_path)
    restored = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, features_only=True).eval()
    x = images(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(restored(x), model.forward_intermediates(x, intermediates_only=True))

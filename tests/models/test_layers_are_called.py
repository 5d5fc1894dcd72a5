"""Every layer is called, always: so hooks, adapters, offloading, pruning, quantisation and counters work."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support.small import images, small_model
from timm.layers import set_fused_attn
from timm.utils import AttentionExtract
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from timm_itpn.layers import blocks, linear

peft = pytest.importorskip('peft', reason='peft is not installed')
accelerate = pytest.importorskip('accelerate', reason='accelerate is not installed')

ACCELERATED = dict(acceleration='full', gather_window=2, migrate={0: 1})
TINY = dict(embed_dim=64, depths=(1, 1, 2), head_init_scale=1.)
MODELS = {
    'fast_itpn': ('fast_itpn_tiny', {}),
    'itpn': ('itpn_tiny', dict(init_values=0.1)),
    'hivit': ('hivit_tiny', {}),
    'fast_itpn-onednn': ('fast_itpn_tiny', {}),
    'fast_itpn-accelerated': ('fast_itpn_tiny', ACCELERATED),
    'itpn-accelerated': ('itpn_tiny', ACCELERATED),
    'fast_itpn-pyramid': ('fast_itpn_tiny_fpn', dict(features_only=True, pyramid_dim=16)),
    'itpn-pyramid': ('itpn_tiny_fpn', dict(features_only=True, pyramid_dim=16, **ACCELERATED)),
}
PLAIN = ('fast_itpn', 'itpn')

every_model = pytest.mark.parametrize('case', MODELS)
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(autouse=True)
def onednn(request, monkeypatch):
    """The same layers on every CPU."""
    wanted = 'onednn' in request.node.callspec.params['case']
    monkeypatch.setattr(linear, 'is_onednn_faster', lambda: wanted)
    monkeypatch.setattr(linear, 'MIN_MULTIPLY_ADDS', 0)


@pytest.fixture(params=[True, False], ids=['fused', 'plain'])
def fused_attn(request):
    set_fused_attn(request.param)
    yield
    set_fused_attn(True)


@pytest.fixture
def plain_attn():
    set_fused_attn(False)
    yield
    set_fused_attn(True)


def build(case, **kwargs):
    """A model whose output is far from zero, and an input for it."""
    name, arguments = MODELS[case]
    return small_model(name, **TINY, **arguments, **kwargs), images(2, 3, 64, 64)


def outputs_of(model, x):
    outputs = model(x)
    return torch.cat([output.flatten() for output in (outputs if isinstance(outputs, list) else [outputs])])


def leaves(model):
    """Modules without children; the head of a feature extractor has no part in the features."""
    return {name: module for name, module in model.named_modules()
            if not list(module.children()) and 'model.head' not in name}


def linear_layers(model):
    return {name: module for name, module in leaves(model).items() if isinstance(module, nn.Linear)}


# hooks

@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
@every_model
def test_every_leaf_is_called(case, train, fused_attn):
    model, x = build(case)
    model.train(train)
    missed = set(leaves(model))
    for name, module in leaves(model).items():
        module.register_forward_hook(lambda *args, name=name: missed.discard(name))
    with torch.set_grad_enabled(train):
        model(x)
    assert missed == set()


@every_model
def test_every_hook_changes_the_output(case):
    """Also where a map is so large that layers without hooks see a few rows of it at a time."""
    model, x = build(case)
    shapes = set()

    def add(module, args, output):
        shapes.add(tuple(output.shape))
        return output + torch.linspace(0, 1, output.numel()).reshape(output.shape)  # a constant is lost in norms

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        before = outputs_of(model, x)
        patch.setattr(blocks, 'SLICE_SIZE', 2048)
        torch.testing.assert_close(outputs_of(model, x), before)
        for name, module in leaves(model).items():
            handle = module.register_forward_hook(add)
            assert not torch.allclose(outputs_of(model, x), before), name
            handle.remove()
    assert {shape[0] for shape in shapes} <= {1, 2, 8}, shapes  # of a bias, of maps, of windows


# what is done to layers

@every_model
def test_lora_on_qkv_changes_the_output_and_learns(case):
    model, x = build(case)
    before = outputs_of(model, x)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=['qkv'], init_lora_weights=False)).eval()
    after = outputs_of(tuned, x)
    assert not torch.allclose(after, before)
    after.square().sum().backward()
    lora = {name: parameter for name, parameter in tuned.named_parameters() if 'lora_' in name}
    assert len(lora) == 4 and all(parameter.grad.any() for parameter in lora.values())
    torch.testing.assert_close(outputs_of(tuned.merge_and_unload(), x), after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('config', [
    lambda: peft.LoraConfig(target_modules=['qkv', 'proj'], lora_bias=False, use_dora=True, init_lora_weights=False),
    lambda: peft.IA3Config(target_modules=['qkv'], feedforward_modules=[], init_ia3_weights=False),
    lambda: peft.OFTConfig(target_modules=['qkv'], init_weights=False),
    lambda: peft.LoHaConfig(target_modules=['qkv'], init_weights=False),
], ids=['dora', 'ia3', 'oft', 'loha'])
@pytest.mark.parametrize('case', PLAIN)
def test_adapters_of_all_kinds_merge(case, config):
    model, x = build(case)
    before = outputs_of(model, x)
    tuned = peft.get_peft_model(model, config()).eval()
    after = outputs_of(tuned, x)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(outputs_of(tuned.merge_and_unload(), x), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('case', PLAIN)
def test_linear_layers_are_pytorchs_own_and_so_are_their_biases(case):
    model, _ = build(case)
    for layer in linear_layers(model).values():
        assert set(layer._parameters) == {'weight', 'bias'}


@pytest.mark.parametrize('offload', ['cpu', 'disk'])
@every_model
def test_offloaded_weights_arrive(case, offload, tmp_path):
    model, x = build(case)
    with torch.no_grad():
        before = outputs_of(model, x)
        if offload == 'cpu':
            accelerate.cpu_offload(model, execution_device=torch.device('cpu'))
        else:
            accelerate.disk_offload(model, tmp_path, execution_device=torch.device('cpu'))
        assert all(parameter.is_meta for parameter in model.parameters())
        assert torch.equal(outputs_of(model, x), before)


@every_model
def test_patched_linear_and_global_hooks_are_seen(case, monkeypatch):
    model, x = build(case)
    wanted = set(linear_layers(model).values())
    patched, hooked = set(), set()

    def forward(self, x):
        patched.add(self)
        return F.linear(x, self.weight, self.bias)

    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: hooked.add(module))
    monkeypatch.setattr(nn.Linear, 'forward', forward)
    try:
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
    assert patched == wanted and set(leaves(model).values()) <= hooked


@every_model
def test_flop_counter_lists_every_layer(case):
    model, x = build(case)
    with FlopCounterMode(display=False) as counter:
        model(x)
    counts = counter.get_flop_counts()
    layers = [name for name, module in leaves(model).items() if isinstance(module, (nn.Linear, nn.Conv2d))]
    assert [name for name in layers if not counts.get(f'{type(model).__name__}.{name}')] == []


@every_model
def test_pruned_layers_train_on(case):
    model, x = build(case)
    for layer in linear_layers(model).values():
        prune.random_unstructured(layer, 'weight', 0.5)
    for _ in range(2):
        outputs_of(model.train(), x).square().sum().backward()
    assert all(layer.weight_orig.grad.any() for layer in linear_layers(model).values())


@every_model
def test_linear_layers_can_be_rebuilt_of_weight_and_bias(case):
    """As bitsandbytes and other quantisers do, who know in_features, out_features, weight and bias."""
    model, x = build(case)
    with torch.no_grad():
        before = outputs_of(model, x)
        for name, layer in linear_layers(model).items():
            twin = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            twin.weight.copy_(layer.weight)
            if layer.bias is not None:
                twin.bias.copy_(layer.bias)
            model.set_submodule(name, twin)
        torch.testing.assert_close(outputs_of(model, x), before)


@pytest.mark.parametrize('case', PLAIN)
def test_dynamic_quantisation_takes_the_linear_layers(case):
    """PyTorch chooses by exact class."""
    model, x = build(case)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    taken = {name for name, module in quantised.named_modules() if isinstance(module, torch.ao.nn.quantized.Linear)}
    assert taken == {name for name, layer in linear_layers(model).items() if type(layer) is nn.Linear}
    before, after = outputs_of(model, x), outputs_of(quantised, x)
    assert 0 < (after - before).std() < 0.1 * before.std()


# attention maps

@every_model
def test_every_block_shows_its_attention_weights(case, plain_attn):
    model, x = build(case)
    maps = AttentionExtract(model, method='hook')(x)
    assert len(maps) == 2
    for weights in maps.values():
        assert weights.ndim == 4 and weights.shape[1] == 2
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize('dynamic_img_size', [False, True])
@pytest.mark.parametrize('case', PLAIN)
def test_graph_shows_every_blocks_attention_weights(case, dynamic_img_size, plain_attn):
    model, x = build(case, dynamic_img_size=dynamic_img_size)
    by_graph, by_hook = (AttentionExtract(model, method=method)(x) for method in ('fx', 'hook'))
    assert list(by_graph) == [f'stages.2.blocks.{i}.attn.softmax' for i in (0, 1)]
    torch.testing.assert_close(list(by_graph.values()), list(by_hook.values()))

"""Models with token gathering and migration."""
import copy

import pytest
import timm
import torch
from support.small import FAMILIES, PYRAMIDS, images, small_model
from timm.models import load_state_dict

from timm_itpn import fuse
from timm_itpn.acceleration.stage import MigrationStage
from timm_itpn.layers.stages import AttentionStage

# 6 x 6 tokens in 4 windows of 9, and 4 x 7 in 6 windows of 4 to 6
ON = dict(gather_window=3, gather_blocks=[0], migrate={0: 2, 1: 0.25}, img_size=96)
PADDED = dict(gather_window=3, migrate={0: 1}, img_size=(64, 112))
EACH = [ON, PADDED]

pytestmark = pytest.mark.usefixtures('one_thread')
every_family = pytest.mark.parametrize('name', FAMILIES)


def forward(model, x, dtype=torch.float64):
    with torch.no_grad():
        return model.to(dtype)(x.to(dtype))


def same_weights(name, **kwargs):
    """A model, and another of other arguments with its weights."""
    plain = small_model(name, head_init_scale=1., img_size=kwargs.get('img_size', 64))  # without acceleration
    other = small_model(name, head_init_scale=1., **kwargs)
    other.load_state_dict(plain.state_dict())
    return plain, other


# what it is

@every_family
def test_nothing_changes_where_it_is_off(name):
    model = small_model(name, acceleration=None, gather_window=0, migrate={})
    assert type(model.stages[2]) is AttentionStage


@every_family
def test_one_window_without_migration_is_global_attention(name):
    plain, windowed = same_weights(name, gather_window=4)
    assert type(windowed.stages[2]) is MigrationStage
    x = images(2, 3, 64, 64)
    torch.testing.assert_close(forward(windowed, x), forward(plain, x), rtol=1e-12, atol=1e-12)


@every_family
@pytest.mark.parametrize('kwargs', [dict(img_size=96), dict(img_size=(64, 112))])
def test_windows_without_windowed_blocks_are_global_attention(name, kwargs):
    """Global blocks between windowed ones see all tokens."""
    plain, other = same_weights(name, gather_window=3, gather_blocks=[0], **kwargs)
    other.stages[2].windowed = [False] * len(other.stages[2].blocks)
    x = images(2, 3, *plain.patch_embed.img_size)
    torch.testing.assert_close(forward(other, x), forward(plain, x), rtol=1e-12, atol=1e-12)


@every_family
def test_windows_without_gathering_see_only_themselves(name, monkeypatch):
    """Of equal windows, each is what it would be as an image of its own."""
    plain = small_model(name, head_init_scale=1., depths=(1, 1, 2), img_size=32, global_pool='')
    model = small_model(name, head_init_scale=1., depths=(1, 1, 2), img_size=64, gather_window=2, global_pool='')
    state = plain.state_dict()
    tiled = state['stages.2.pos_embed'].reshape(1, 2, 2, -1).repeat(1, 2, 2, 1).reshape(1, 16, -1)
    state['stages.2.pos_embed'] = tiled
    for key in [key for key in state if key.endswith('relative_position_bias_table')]:
        table = model.state_dict()[key].reshape(7, 7, -1)
        table[2:5, 2:5] = state[key].reshape(3, 3, -1)
        state[key] = table.flatten(0, 1)
    model.load_state_dict(state)
    stage = model.stages[2]
    monkeypatch.setattr('timm_itpn.acceleration.stage.gathering_bias', lambda n: torch.full((4, 4), -torch.inf))
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        maps = model.stages[1](model.stages[0](model.patch_embed(x)))
        embedded = stage.embed(maps)
        stage.embed = lambda x: embedded
        blocks = [torch.cat([part for part in row.split(2, dim=2)]) for row in embedded.split(2, dim=1)]
        tokens = torch.cat(blocks).flatten(1, 2)  # four windows of four tokens
        for block in plain.stages[2].blocks:
            tokens = block(tokens, 2, 2)
        out = stage(maps)
    windows = torch.stack([out[0, 2 * i:2 * i + 2, 2 * j:2 * j + 2].flatten(0, 1) for i in (0, 1) for j in (0, 1)])
    torch.testing.assert_close(windows, tokens, rtol=1e-4, atol=1e-5)


@every_family
@pytest.mark.parametrize('kwargs', EACH)
@pytest.mark.parametrize('carry', [False, True])
def test_tokens_that_left_are_as_they_were_or_carried(name, kwargs, carry):
    """Neither the MLP of the block where they left, nor any later block, has changed them; or as their partners."""
    model = small_model(name, head_init_scale=1., carry=carry, **kwargs)
    x = images(2, 3, *model.patch_embed.img_size)
    with torch.no_grad():
        maps, left = model.stages[2].run(model.stages[:2](model.patch_embed(x)))
    left = [group for group in left if group is not None]
    assert len(left) == len(kwargs['migrate'])
    flat = maps.flatten(1, 2)
    for tokens, positions, partners, partner_positions in left:
        for b in range(2):
            gained = flat[b, partner_positions[b].flatten()] - partners[b].flatten(0, 1) if carry else 0.
            assert torch.equal(flat[b, positions[b].flatten()], tokens[b].flatten(0, 1) + gained)
    gone = torch.cat([group.positions.flatten(1, 2) for group in left], dim=1)
    assert all(len(set(row.tolist())) == len(row) for row in gone)  # nobody leaves twice
    assert (gone < flat.shape[1]).all()  # and no padded position does
    assert all((group.partner_positions < flat.shape[1]).all() for group in left)


@pytest.mark.parametrize('kwargs', EACH)
def test_the_same_number_leaves_every_window(kwargs):
    model = small_model('fast_itpn_tiny', **kwargs)
    stage = model.stages[2]
    x = images(2, 3, *model.patch_embed.img_size)
    with torch.no_grad():
        _, left = stage.run(model.stages[:2](model.patch_embed(x)))
    assert [group and group.positions.shape[2] for group in left] == ([2, 2] if kwargs is ON else [1, None])
    H, W = stage.grid_size
    for group in left if kwargs is ON else ():
        for p in (group.positions, group.partner_positions):
            rows, columns = (p // W) * -(-H // 3) // H, (p % W) * -(-W // 3) // W
            assert (rows * 2 + columns == torch.arange(4)[None, :, None]).all()


# that it works as models do

@pytest.mark.parametrize('name', [*FAMILIES, *PYRAMIDS])
@pytest.mark.parametrize('kwargs', EACH)
def test_gradients_reach_all_parameters(name, kwargs):
    kwargs = {**kwargs, 'head_init_scale': 1., 'features_only': name in PYRAMIDS}
    model = small_model(name, **kwargs).train()
    size = (96, 96) if kwargs['img_size'] == 96 else kwargs['img_size']
    outputs = model(images(2, 3, *size))
    outputs = outputs if isinstance(outputs, list) else [outputs]
    sum(output.square().mean() for output in outputs).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key


@every_family
def test_gradient_checkpointing_changes_nothing(name):
    gradients = []
    for enable in (False, True):
        model = small_model(name, head_init_scale=1., **ON).train()
        model.set_grad_checkpointing(enable)
        model(images(2, 3, 96, 96)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


@every_family
def test_runs_repeat_under_deterministic_algorithms(name):
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            model = small_model(name, head_init_scale=1., **ON).train()
            model(images(2, 3, 96, 96)).square().mean().backward()
            results.append([p.grad for p in model.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(*results):
        assert torch.equal(a, b)


@every_family
def test_batches_do_not_matter(name):
    model = small_model(name, head_init_scale=1., **ON)
    x = images(3, 3, 96, 96)
    torch.testing.assert_close(
        forward(model, x), torch.cat([forward(model, part) for part in x.split(1)]), rtol=1e-10, atol=1e-10)
    assert forward(model, x[:0]).shape == (0, 5)


@every_family
@pytest.mark.parametrize('kwargs', EACH)
def test_all_attention_implementations_agree(name, kwargs):
    plain = small_model(name, head_init_scale=1., **kwargs)
    x = images(2, 3, *plain.patch_embed.img_size)
    wanted = forward(plain, x)
    for attn_impl in ('reference', 'sdpa'):
        model = small_model(name, head_init_scale=1., attn_impl=attn_impl, **kwargs)
        torch.testing.assert_close(forward(model, x), wanted, rtol=1e-9, atol=1e-9)


@every_family
@pytest.mark.parametrize('kwargs', EACH)
def test_fused_models_agree(name, kwargs):
    model = small_model(name, head_init_scale=1., **kwargs)
    x = images(2, 3, *model.patch_embed.img_size)
    torch.testing.assert_close(forward(fuse(model.double()), x), forward(model, x), rtol=1e-9, atol=1e-9)


@every_family
def test_dynamic_sizes_are_those_of_fixed_ones(name):
    kwargs = dict(head_init_scale=1., gather_window=3, migrate={0: 0.25})
    dynamic = small_model(name, dynamic_img_size=True, **kwargs)
    for size in ((64, 64), (96, 96), (64, 112), (16, 32)):
        fixed = copy.deepcopy(dynamic)
        fixed.set_input_size(size)
        x = images(2, 3, *size)
        torch.testing.assert_close(forward(dynamic, x), forward(fixed, x), rtol=1e-5, atol=1e-5)


@every_family
def test_weights_are_those_of_the_plain_model(name, tmp_path):
    model = small_model(name, **ON)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in small_model(name, img_size=96).state_dict().items()}
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    other = small_model(name, seed=1, **ON)
    other.load_state_dict(load_state_dict(str(tmp_path / 'model.pth')))
    x = images(1, 3, 96, 96)
    assert torch.equal(forward(other, x), forward(model, x))


@every_family
def test_config_json_keeps_the_acceleration(name, tmp_path):
    kwargs = dict(
        acceleration='full', gather_window=3, migrate={1: 0.25}, gather_blocks=[0])
    model = small_model(name, **kwargs)
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert repr(again.stages[2]) == repr(model.stages[2])
    x = images(1, 3, 64, 64)
    assert torch.equal(forward(again, x), forward(model, x))


# compilers; exporters: tests/models/test_exports.py

def test_one_graph_agrees_with_eager():
    torch._dynamo.reset()
    model = small_model('itpn_tiny', depths=(1, 1, 2), head_init_scale=1., **ON).train()
    results = []
    for module in (torch.compile(model, fullgraph=True, backend='aot_eager'), model):
        model.zero_grad()
        output = module(images(2, 3, 96, 96))
        output.square().mean().backward()
        results.append([output.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # sympy, on the number and the sides of windows
@every_family
def test_dynamic_sizes_compile_into_one_graph(name):
    torch._dynamo.reset()
    model = small_model(name, head_init_scale=1., dynamic_img_size=True, gather_window=3, migrate={0: 0.25})
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager', dynamic=True)
    for size in ((64, 64), (96, 96), (64, 112)):
        x = images(2, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


# refusals

def test_too_much_migration_is_refused_for_the_size():
    with pytest.raises(ValueError, match='migrate lets 9 tokens leave at block 0, but of the 16 in a window'):
        small_model('fast_itpn_tiny', migrate={0: 9})
    model = small_model('fast_itpn_tiny', migrate={0: 8})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match='migrate lets 8 tokens leave at block 0, but of the 4 in a window'):
        model.set_input_size(32)
    assert model.patch_embed.img_size == (64, 64)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model = small_model('fast_itpn_tiny', migrate={0: 8}, dynamic_img_size=True)
    with pytest.raises(ValueError, match='migrate lets 8 tokens leave at block 0, but of the 4 in a window'):
        model(images(1, 3, 32, 32))


def test_unknown_acceleration_is_refused():
    with pytest.raises(ValueError, match="acceleration 'fast' is unknown, use one of"):
        timm.create_model('fast_itpn_tiny', acceleration='fast')

"""torch.compile in training and evaluation: no graph breaks, few compilations, values and gradients of eager."""
import copy
import itertools

import pytest
import torch
from support.small import FAMILIES, PYRAMIDS, images, small_model
from torch._dynamo.testing import CompileCounterWithBackend

SIZES = [(64, 64), (96, 48), (48, 112), (80, 80)]  # the first is that of the position embeddings

pytestmark = pytest.mark.usefixtures('fresh', 'one_thread')


@pytest.fixture
def fresh():
    """No test sees what another has compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(name, **kwargs):
    kwargs = dict(embed_dim=64, depths=(1, 1, 1), head_init_scale=1., features_only=name in PYRAMIDS) | kwargs
    if name in PYRAMIDS:
        kwargs['pyramid_dim'] = 32
    return small_model(name, **kwargs)


def outputs_of(module, x):
    outputs = module(x)
    return outputs if isinstance(outputs, (list, tuple)) else [outputs]


def run(module, model, x):
    """Outputs, and in training gradients of `model`, which is what `module` computes."""
    if not model.training:
        with torch.no_grad():
            return [x.clone() for x in outputs_of(module, x)], []
    model.zero_grad()
    outputs = outputs_of(module, x)
    sum(output.square().mean() for output in outputs).backward()
    return [output.detach() for output in outputs], [p.grad.clone() for p in model.parameters()]


def assert_agree(compiled, model, x):
    for actual, wanted in zip(run(compiled, model, x), run(model, model, x)):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('name', 'mode'), [
    *itertools.product(FAMILIES, ('eval', 'checkpointing')), *itertools.product(PYRAMIDS, ('train',))])
def test_one_graph_agrees_with_eager(name, mode):
    model = build(name).train(mode != 'eval')
    if mode == 'checkpointing':
        model.set_grad_checkpointing()
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for shift in (0., 1.):
        assert_agree(compiled, model, images(2, 3, 64, 64) + shift)
    assert counter.frame_count == 1


@pytest.mark.parametrize(('name', 'mode'), [
    ('fast_itpn_tiny', 'eval'),
    # sympy, on the sizes of the merges' reshapes
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('fast_itpn_tiny', 'train'), ('itpn_tiny', 'eval'), ('itpn_tiny', 'train'))),
])
def test_changing_sizes_take_few_compilations(name, mode):
    """Some for the size of the position embeddings, where nothing is resampled, some for another, and then no more."""
    model = build(name, dynamic_img_size=True).train(mode == 'train')
    counter = CompileCounterWithBackend('eager')
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for size in SIZES[:2]:
        assert_agree(compiled, model, images(2, 3, *size))
    count = counter.frame_count
    assert count <= 2
    for batch, size in itertools.product((2, 3), SIZES):
        assert_agree(compiled, model, images(batch, 3, *size))
    assert counter.frame_count == count


def test_weights_loaded_after_compilation_are_seen():
    """In evaluation the relative position bias is kept between calls, but never in a graph."""
    model = build('itpn_tiny')
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    x = images(2, 3, 64, 64)
    before, _ = run(compiled, model, x)
    model.load_state_dict(build('itpn_tiny', seed=1).state_dict())
    after, _ = run(compiled, model, x)
    assert not torch.allclose(before[0], after[0])
    assert_agree(compiled, model, x)


def test_autocast_compiles_into_one_graph():
    for name in FAMILIES:
        model = build(name).train()
        compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
        x = images(2, 3, 64, 64)
        exact = copy.deepcopy(model).double()(x.double())
        with torch.autocast('cpu', dtype=torch.bfloat16):
            output = compiled(x)
        output.float().square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert (output.double() - exact).abs().max() / exact.std() < 16 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(('name', 'train'), [
    ('fast_itpn_tiny', False),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (('fast_itpn_tiny', True), ('itpn_tiny', False)))])
def test_inductor_agrees_with_eager(name, train):
    model = build(name, embed_dim=32, num_heads=1).train(train)
    assert_agree(torch.compile(model, fullgraph=True), model, images(2, 3, 64, 64))


def test_compiled_model_copies():
    model = build('fast_itpn_tiny')
    compiled = torch.compile(model, backend='eager')
    x = images(2, 3, 64, 64)
    wanted, _ = run(compiled, model, x)
    twin = copy.deepcopy(compiled)
    torch.testing.assert_close(run(twin, model, x)[0], wanted)
    assert set(twin.state_dict()) == {f'_orig_mod.{key}' for key in model.state_dict()}

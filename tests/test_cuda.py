"""What only a CUDA device can show. As much of it as makes sense runs on the CPU too, so that the tests are tested."""
import copy
import itertools
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import timm
import torch
import torch.nn.functional as F
from support import golden
from support.small import FAMILIES, PYRAMIDS, images, small_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_itpn.bench.baseline import Baseline
from timm_itpn.ops.attention import record_kernels

GOLDENS = {  # golden: model
    'fast_itpn_tiny': 'fast_itpn_tiny',
    'fast_itpn_base': 'fast_itpn_base',
    'itpn_base_clip': 'itpn_base.clip_in1k',
    'itpn_base_pixel': 'itpn_base.pixel_in1k',
    'hivit_base': 'hivit_base.mae_in1k_ft_in1k',
}
HALF = {'bf16': torch.bfloat16, 'fp16': torch.float16}

every_device = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
every_family = pytest.mark.parametrize('name', FAMILIES)
every_model = pytest.mark.parametrize('name', [*FAMILIES, *PYRAMIDS])
every_mode = pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])


# what the tests share

@pytest.fixture(autouse=True)
def exact_float32():
    """No TF32, whatever the process was told before."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


@contextmanager
def waiting_for_the_device_is_an_error(device):
    if device == 'cpu':
        yield
        return
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)  # the mode is a prototype
            torch.cuda.set_sync_debug_mode('error')
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


def build(name, device, **kwargs):
    kwargs = dict(head_init_scale=1., features_only=name in PYRAMIDS, **kwargs)
    return small_model(name, **kwargs).to(device)


def pixels(*shape, device, shift=0.):
    """Different images for each `shift`; a constant would be lost in the first norm of iTPN."""
    return (images(*shape) * (1 + shift) + shift).to(device)


def total(outputs):
    """A loss of what a model or a feature extractor gives."""
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    return sum(output.float().square().mean() for output in outputs)


def capture(function, device, *inputs):
    """Record `function` of tensors as a CUDA graph, without the steps that warm up; on the CPU it is called instead.

    Returns:
        A function that replays the graph on other inputs, and returns its outputs, which the next replay overwrites.
    """
    if device == 'cpu':
        return function
    static = [x.clone() for x in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(*static)

    def replay(*inputs):
        for own, new in zip(static, inputs):
            own.copy_(new)
        graph.replay()
        return outputs

    return replay


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


# no waiting

@pytest.mark.parametrize('dynamic', [False, True], ids=['fixed', 'dynamic'])
@every_mode
@every_model
@every_device
def test_host_never_waits(device, name, train, dynamic):
    drops = dict(drop_path_rate=0.2, proj_drop_rate=0.1, pos_drop_rate=0.1)
    model = build(name, device, dynamic_img_size=dynamic, **drops).train(train)
    sizes = [(64, 64), (96, 48)] if dynamic else [(64, 64)]
    inputs = [pixels(2, 3, *size, device=device) for size in sizes]

    def step(x):
        with torch.set_grad_enabled(train):
            loss = total(model(x))
        if train:
            loss.backward()

    step(inputs[0])  # libraries load, and memory is taken, in the first
    model.zero_grad()
    with waiting_for_the_device_is_an_error(device):
        for x in inputs:
            step(x)


@pytest.mark.gpu
def test_waiting_is_noticed():
    x = torch.ones(1, device='cuda')
    with pytest.raises(RuntimeError, match='synchroniz'), waiting_for_the_device_is_an_error('cuda'):
        x.item()


@pytest.mark.parametrize('checkpointing', [False, True], ids=['keeping', 'checkpointing'])
@every_family
@every_device
def test_host_never_waits_with_an_optimizer_and_autocast(device, name, checkpointing):
    model = build(name, device).train()
    model.set_grad_checkpointing(checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device == 'cuda')
    x, target = pixels(2, 3, 64, 64, device=device), torch.arange(2, device=device)

    def step():
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()

    step()
    with waiting_for_the_device_is_an_error(device):
        step()


# rehearsal: tensors without values, which PyTorch takes for CUDA tensors where no CUDA device is

class OnlyCuda(TorchDispatchMode):
    """Every tensor must be on CUDA; one that comes from the host is copied, which waits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, outputs)):
            assert not isinstance(x, torch.Tensor) or x.is_cuda, f'{func} has a tensor on {x.device}'
        return outputs


@contextmanager
def cuda_autocast(dtype):
    """As `torch.autocast`, which does nothing without a device."""
    before = torch.get_autocast_dtype('cuda')
    torch.set_autocast_enabled('cuda', True)
    torch.set_autocast_dtype('cuda', dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled('cuda', False)
        torch.set_autocast_dtype('cuda', before)
        torch.clear_autocast_cache()


def rehearse(model, *shapes):
    """Run a model for images of several shapes, as it is and under autocast; waiting for the device is an error."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model.to_empty(device='cuda')
        mode.allow_non_fake_inputs = False
        with torch.no_grad(), OnlyCuda():
            for context, dtype in ((nullcontext(), torch.float32), (cuda_autocast(torch.bfloat16), torch.bfloat16)):
                with context:
                    for shape in shapes:
                        outputs = model(torch.empty(shape, device='cuda'))
                        assert dtype in [x.dtype for x in tree_leaves(outputs)]


@pytest.mark.parametrize(('name', 'kind'), [
    *itertools.product(FAMILIES, ('fixed', 'dynamic')), *itertools.product(PYRAMIDS, ('dynamic', 'accelerated')),
    # the same stages as those
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        *itertools.product(FAMILIES, ('accelerated',)), *itertools.product(PYRAMIDS, ('fixed',))))])
def test_rehearsal_without_device(name, kind):
    kwargs = dict(dynamic_img_size=kind != 'fixed', features_only=name in PYRAMIDS, embed_dim=64, depths=(1, 1, 2))
    if kind == 'accelerated':
        kwargs |= dict(acceleration='full', gather_window=2, migrate={0: 1})
    model = small_model(name, device='meta', **kwargs)
    rehearse(model, (2, 3, 64, 64), *([] if kind == 'fixed' else [(2, 3, 96, 48)]))


def test_rehearsal_notices_waiting_and_the_host():
    class Waits(torch.nn.Module):
        def forward(self, x):
            return x * x.sum().item()

    class Copies(torch.nn.Module):
        def forward(self, x):
            return x * torch.tensor([2.]).to(x.device)

    with pytest.raises(RuntimeError, match='local_scalar_dense'):
        rehearse(Waits(), (2,))
    with pytest.raises(AssertionError, match='has a tensor on cpu'):
        rehearse(Copies(), (2,))


# CUDA graphs

@pytest.mark.parametrize('dynamic', [False, True], ids=['fixed', 'dynamic'])
@every_model
@every_device
def test_graph_of_forward_follows_inputs_and_weights(device, name, dynamic):
    model = build(name, device, dynamic_img_size=dynamic)
    x = pixels(2, 3, 64, 96 if dynamic else 64, device=device)
    with torch.no_grad():
        model(x)  # a relative position bias is kept from here
        replay = capture(model, device, x)
        for shift in (0., 0.5):
            new = pixels(*x.shape, device=device, shift=shift)
            assert_close(replay(new), model(new))
        model.load_state_dict(build(name, device, seed=1, dynamic_img_size=dynamic).state_dict())
        assert_close(replay(x), model(x))


@pytest.mark.parametrize('dynamic', [False, True], ids=['fixed', 'dynamic'])
@every_family
@every_device
def test_graph_of_a_training_step_trains_as_eager(device, name, dynamic):
    model = build(name, device, dynamic_img_size=dynamic).train()
    size = (64, 96 if dynamic else 64)
    target = torch.arange(2, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step_of(model, optimizer):
        def step(x):
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            return loss.detach()
        return step

    replay = capture(step_of(model, optimizer), device, pixels(2, 3, *size, device=device))
    twin = copy.deepcopy(model)  # warming up has changed the weights
    eager = step_of(twin, torch.optim.SGD(twin.parameters(), lr=0.1))
    for shift in (0., 0.3, 0.6):
        x = pixels(2, 3, *size, device=device, shift=shift)
        assert_close(replay(x), eager(x))
    for (key, actual), wanted in zip(model.named_parameters(), twin.parameters()):
        assert_close(actual, wanted)
        assert actual.isfinite().all(), key


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # of the function that warms up
@every_family
def test_graphed_callable_has_the_gradients_of_eager(name):
    model = build(name, 'cuda').train()
    twin = copy.deepcopy(model)
    graphed = torch.cuda.make_graphed_callables(twin, (pixels(2, 3, 64, 64, device='cuda'),))
    for shift in (0., 0.5):
        x = pixels(2, 3, 64, 64, device='cuda', shift=shift)
        for module in (model, graphed):
            module.zero_grad()
            total(module(x)).backward()
        for actual, wanted in zip(twin.parameters(), model.parameters()):
            assert_close(actual.grad, wanted.grad)


# torch.compile with all it has

@pytest.mark.gpu
@pytest.mark.filterwarnings(  # of PyTorch, about itself, and about TF32, which these tests do without
    'ignore:TensorFloat32 tensor cores', 'ignore:The CUDA Graph is empty', 'ignore:TypedStorage is deprecated')
@pytest.mark.parametrize(('name', 'train', 'mode'), [
    *itertools.product([*FAMILIES, *PYRAMIDS], (False, True), ['reduce-overhead']),
    *itertools.product(FAMILIES, (False, True), ['max-autotune']),
])
def test_compiled_model_agrees_with_eager(name, train, mode):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build(name, 'cuda').train(train)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for shift in (0., 0.1, 0.2, 0.3):  # in the first calls CUDA graphs warm up and are recorded
        x = pixels(2, 3, 64, 64, device='cuda', shift=shift)
        results = []
        for module in (compiled, model):
            torch.compiler.cudagraph_mark_step_begin()
            model.zero_grad()
            with torch.set_grad_enabled(train):
                loss = total(module(x))
            if train:
                loss.backward()
            results.append([loss.detach().clone(), *(p.grad.clone() for p in model.parameters() if train)])
        for actual, wanted in zip(*results):
            assert_close(actual, wanted)
    assert torch._dynamo.utils.counters['inductor']['cudagraph_skips'] == 0
    torch._dynamo.reset()


# kernels

@pytest.mark.parametrize(('device', 'size'), [
    ('cpu', 224), *(pytest.param('cuda', size, marks=pytest.mark.gpu) for size in (224, 512))])
@pytest.mark.parametrize('dtype', HALF)
def test_fast_itpn_attends_through_flash_or_cudnn(device, dtype, size):
    model = small_model('fast_itpn_tiny', img_size=size).to(device, HALF[dtype])
    with record_kernels() as kernels:
        model(pixels(2, 3, size, size, device=device).to(HALF[dtype]))
    assert kernels.names in (['flash'], ['cuDNN'])


@pytest.mark.parametrize('mode', ['autocast', *HALF])
@pytest.mark.parametrize('dynamic', [False, True], ids=['fixed', 'dynamic'])
@every_device
def test_attention_with_relative_position_bias_is_fused(device, dynamic, mode):
    model = small_model('itpn_tiny', img_size=224, dynamic_img_size=dynamic).to(device)
    x = pixels(2, 3, 224, 240 if dynamic else 224, device=device)
    context = nullcontext()
    if mode == 'autocast':
        context = torch.autocast(device, dtype=torch.bfloat16)
    else:
        model, x = model.to(HALF[mode]), x.to(HALF[mode])
    with context, torch.no_grad(), record_kernels() as kernels:
        model(x)
    assert len(kernels.names) > 0 and 'maths' not in kernels.names


# values

@pytest.mark.gpu
@pytest.mark.parametrize('name', GOLDENS)
def test_golden_values_hold_in_float32(name):
    expected = golden.load(name)
    model = timm.create_model(GOLDENS[name], num_classes=1000).eval()
    model.load_state_dict(golden.official_state_dict(expected, torch.float32))
    with torch.inference_mode():
        output = model.cuda()(golden.image(expected, torch.float32).cuda())
    assert golden.error(output.cpu(), expected['logits']) < 1e-4


@pytest.mark.parametrize('dtype', HALF)
@every_family
@every_device
def test_mixed_precision_training_stays_finite(device, name, dtype):
    if device == 'cpu' and dtype == 'fp16':
        pytest.skip('fp16 training is for CUDA')
    model = build(name, device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device, enabled=dtype == 'fp16', init_scale=2. ** 10)
    x, target = pixels(4, 3, 64, 64, device=device), torch.arange(4, device=device)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=HALF[dtype]):
            loss = F.cross_entropy(model(x), target)
        scaler.scale(loss).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# memory

def peak_mib(model, size, batch):
    """Peak of a training step, above weights and gradients."""
    model.cuda().train()
    x = pixels(batch, 3, size, size, device='cuda')
    for measured in (False, True):
        if measured:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        with torch.autocast('cuda', dtype=torch.bfloat16):
            loss = total(model(x))
        loss.backward()
        del loss
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 20


@pytest.mark.gpu
@pytest.mark.parametrize(('size', 'batch'), [(224, 16), (512, 4)])
def test_training_step_needs_less_memory_than_the_baseline(size, batch):
    ours = timm.create_model('fast_itpn_base', img_size=size)
    keeping = peak_mib(ours, size, batch)
    ours.set_grad_checkpointing()
    checkpointing = peak_mib(ours, size, batch)
    del ours
    assert keeping < peak_mib(Baseline(img_size=(size, size)), size, batch)
    assert checkpointing < 0.5 * keeping

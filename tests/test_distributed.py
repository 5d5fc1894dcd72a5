"""DDP and FSDP2 on two gloo processes: the training of one process on the joint batch, and nothing to warn of.

Each case is a function that both processes run, in float64, where the order of sums does not matter.
"""
import copy
import itertools
import logging
import multiprocessing.connection
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.processes import INTERPRETERS
from support.small import FAMILIES, PYRAMIDS, images, small_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from timm_itpn.layers.blocks import AttentionBlock, MlpBlock

NUM_RANKS = 2
TIMEOUT_S = 100
SHALLOW = dict(depths=(1, 1, 1))  # each block takes FSDP2 its time
SIZES = {False: [(64, 64), (64, 64)], True: [(64, 96), (96, 48)]}  # by dynamic_img_size: (height, width) of each step

every_model = pytest.mark.parametrize(('name', 'dynamic'), [*itertools.product(FAMILIES, (False, True))])


# processes

class Loud(logging.Handler):
    """What is logged as a warning is an error."""

    def emit(self, record: logging.LogRecord) -> None:
        raise AssertionError(f'{record.name}: {record.getMessage()}')


def serve(rank, store, connection):
    """A process: runs what the connection brings until it brings None. Warnings are errors, those of C++ too."""
    torch.set_num_threads(1)
    torch.set_warn_always(True)  # not once in the first case that has a reason
    for name in (None, 'torch'):
        logging.getLogger(name).addHandler(Loud(logging.WARNING))
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=NUM_RANKS, timeout=timeout)
    while (job := connection.recv()) is not None:
        case, kwargs = job
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('error')
                case(**kwargs)
            connection.send('')
        except BaseException:
            connection.send(traceback.format_exc())
    dist.destroy_process_group()


class Ranks:
    """Processes of one group. They stay for the next case; after an error they are started anew."""

    def __init__(self):
        self.processes = []

    def start(self):
        store = tempfile.NamedTemporaryFile(prefix='timm_itpn_store_', delete=False).name
        pipes = [INTERPRETERS.Pipe() for _ in range(NUM_RANKS)]
        self.connections = [ours for ours, _ in pipes]
        self.processes = [
            INTERPRETERS.Process(target=serve, args=(rank, store, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)]
        for process, (_, theirs) in zip(self.processes, pipes):
            process.start()
            theirs.close()

    def run(self, case, **kwargs):
        """Run `case` in every process; the first error, or a process that hangs, fails the test."""
        if not self.processes:
            self.start()
        for connection in self.connections:
            connection.send((case, kwargs))
        waiting = list(self.connections)
        deadline = time.monotonic() + TIMEOUT_S
        while waiting:
            ready = multiprocessing.connection.wait(waiting, timeout=max(0., deadline - time.monotonic()))
            try:
                errors = [connection.recv() for connection in ready]
            except EOFError:
                errors = ['the process has died']
            if not ready or any(errors):
                ranks = [self.connections.index(connection) for connection in waiting]
                self.kill()
                message = '\n'.join(errors) if ready else f'no answer from ranks {ranks} in {TIMEOUT_S} s'
                pytest.fail(message, pytrace=False)
            waiting = [connection for connection in waiting if connection not in ready]

    def stop(self):
        for connection in self.connections if self.processes else ():
            connection.send(None)
        for process in self.processes:
            process.join(10)
        self.kill()

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


@pytest.fixture(scope='module')
def ranks():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1]))  # the processes import this file by its name from there
        ranks = Ranks()
        yield ranks
        ranks.stop()


# what the cases share

def batch(size):
    return images(4, 3, *size, dtype=torch.float64), torch.arange(4)


def own_part(joint):
    return joint.chunk(NUM_RANKS)[dist.get_rank()]


def mean(loss):
    """Mean over the processes."""
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss / NUM_RANKS


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(model, **kwargs):
    """Wrap by FSDP2; blocks are the units, and what is left is one of its own."""
    mesh = init_device_mesh('cpu', (NUM_RANKS,))
    for module in list(model.modules()):
        if isinstance(module, (AttentionBlock, MlpBlock)):
            fully_shard(module, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def wrap(model, wrapper):
    return DistributedDataParallel(model) if wrapper == 'ddp' else shard(model)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)  # else rounding decides the step where grad is 0


def train(model, dynamic):
    """Steps on the same batch in all processes; yields the output of each, and sees to it that the loss falls."""
    optimizer = adamw(model)
    losses = []
    for size in SIZES[dynamic] * 2:
        x, target = batch(size)
        output = model(x.float())
        yield output.detach()
        loss = F.cross_entropy(output.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses


def assert_close(actual, expected, dynamic=False):
    """Compare float64 tensors. With dynamic image size a part of the model is float32: the resampled embeddings."""
    torch.testing.assert_close(actual, expected, rtol=1e-5 if dynamic else 1e-9, atol=1e-7 if dynamic else 1e-12)


def assert_same(model, reference, of, dynamic=False):
    """Compare parameters, or what `of` makes of them, with those of one process."""
    expected = {name: of(p) for name, p in reference.named_parameters()}
    actual = {name.removeprefix('module.'): of(p) for name, p in model.named_parameters()}
    assert [name for name, value in actual.items() if value is None] == []  # no parameter is unused
    assert_close({name: whole(value) for name, value in actual.items()}, expected, dynamic)


# training

def train_as_one_process(name, wrapper, dynamic, checkpointing, **kwargs):
    kwargs = dict({**SHALLOW, **kwargs}, dynamic_img_size=dynamic, dtype=torch.float64, head_init_scale=1.)
    reference = small_model(name, **kwargs).train()
    model = copy.deepcopy(reference)
    model.set_grad_checkpointing(checkpointing)
    model = wrap(model, wrapper)
    optimizers = [adamw(model), adamw(reference)]
    for size in SIZES[dynamic]:
        x, target = batch(size)
        expected = F.cross_entropy(reference(x), target)
        loss = F.cross_entropy(model(own_part(x)), own_part(target))
        assert_close(mean(loss), expected.detach(), dynamic)
        for optimizer, value in zip(optimizers, (loss, expected)):
            optimizer.zero_grad()
            value.backward()
        assert_same(model, reference, of=lambda p: p.grad, dynamic=dynamic)
        for optimizer in optimizers:
            optimizer.step()
        assert_same(model, reference, of=lambda p: p, dynamic=dynamic)


@pytest.mark.parametrize('wrapper, checkpointing', [('ddp', False), ('fsdp2', True)])
@every_model
def test_training_is_that_of_one_process(ranks, name, dynamic, wrapper, checkpointing):
    ranks.run(train_as_one_process, name=name, wrapper=wrapper, dynamic=dynamic, checkpointing=checkpointing)


@pytest.mark.parametrize('name, wrapper', list(zip(FAMILIES, ('ddp', 'fsdp2'))))
def test_training_with_acceleration_is_that_of_one_process(ranks, name, wrapper):
    ranks.run(
        train_as_one_process, name=name, wrapper=wrapper, dynamic=False, checkpointing=True, depths=(1, 1, 2),
        gather_window=3, gather_blocks=[0], migrate={0: 1, 1: 0.25})


def train_pyramid(name, wrapper, out_indices):
    reference = small_model(
        name, features_only=True, out_indices=out_indices, pyramid_dim=32, dtype=torch.float64, **SHALLOW).train()
    model = wrap(copy.deepcopy(reference), wrapper)
    x, _ = batch((64, 64))
    for _ in range(2):  # DDP tells of unused parameters in the second
        for backbone, part in ((model, own_part(x)), (reference, x)):
            backbone.zero_grad()
            sum(feature.square().mean() for feature in backbone(part)).backward()
        assert_same(model, reference, of=lambda p: p.grad)


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3, 4), (1,), (4,)], ids=str)
@pytest.mark.parametrize('name, wrapper', list(zip(PYRAMIDS, ('fsdp2', 'ddp'))))
def test_pyramids_have_the_gradients_of_one_process(ranks, name, wrapper, out_indices):
    ranks.run(train_pyramid, name=name, wrapper=wrapper, out_indices=out_indices)


# evaluation

def evaluate_between_steps(name, dynamic, mode, reshard):
    reference = small_model(name, dynamic_img_size=dynamic, dtype=torch.float64, head_init_scale=1., **SHALLOW)
    model = shard(copy.deepcopy(reference), reshard_after_forward=reshard)
    optimizers = [adamw(model), adamw(reference)]
    x, target = batch((64, 64))
    for _ in range(2):
        for optimizer, module in zip(optimizers, (model, reference)):
            if mode == 'train':
                module.train()
            optimizer.zero_grad()
            F.cross_entropy(module(x), target).backward()  # the same batch in all processes
            optimizer.step()
            if mode == 'train':
                module.eval()
        with torch.no_grad():
            assert_close(model(x), reference(x), dynamic)


@pytest.mark.parametrize(('mode', 'reshard'), [('train', True), ('eval', False)])
@every_model
def test_evaluation_under_fsdp2_sees_each_step(ranks, name, dynamic, mode, reshard):
    ranks.run(evaluate_between_steps, name=name, dynamic=dynamic, mode=mode, reshard=reshard)


# state dicts

WHOLE = StateDictOptions(full_state_dict=True)


def gather_and_load(name):
    reference = small_model(name, **SHALLOW)
    model = shard(copy.deepcopy(reference))
    optimizer = adamw(model)
    x, target = batch((64, 64))
    x = x.float()
    F.cross_entropy(model(x), target).backward()
    optimizer.step()
    with torch.no_grad():
        expected = model(x)
        assert not torch.equal(expected, reference(x))
        twin = small_model(name, seed=1, **SHALLOW)
        twin.load_state_dict(get_model_state_dict(model, options=WHOLE))
        torch.testing.assert_close(twin(x), expected)
        set_model_state_dict(model, reference.state_dict(), options=WHOLE)  # back, without a change of mode
        torch.testing.assert_close(model(x), reference(x))


@pytest.mark.parametrize('name', FAMILIES)
def test_gathered_state_dict_loads_in_a_plain_model_and_back(ranks, name):
    ranks.run(gather_and_load, name=name)


# mixed precision, and weights that are made where they are needed

def train_in_mixed_precision(name, dynamic):
    reference = small_model(name, dynamic_img_size=dynamic, head_init_scale=1.).train()
    with torch.no_grad():
        expected = reference(batch(SIZES[dynamic][0])[0].float())
    model = shard(reference, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    first, *others = train(model, dynamic)
    assert {output.dtype for output in (first, *others)} == {torch.bfloat16}
    assert (first.float() - expected).abs().max() / expected.std() < 16 * torch.finfo(torch.bfloat16).eps
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


@every_model
def test_bf16_policy_trains(ranks, name, dynamic):
    ranks.run(train_in_mixed_precision, name=name, dynamic=dynamic)


def ignore_what_torch_says_of_random_numbers():
    """A warning of random numbers in any DTensor on the CPU. To see that it is torch's own, a Linear layer gives it."""
    message = 'DTensor random operators may not have complete support on cpu device mesh'
    linear = fully_shard(torch.nn.Linear(2, 2), mesh=init_device_mesh('cpu', (NUM_RANKS,)))
    with pytest.warns(UserWarning, match=message):
        linear.reset_parameters()
    warnings.filterwarnings('ignore', message)


def train_from_meta_device(name, dynamic):
    ignore_what_torch_says_of_random_numbers()
    kwargs = dict(SHALLOW, dynamic_img_size=dynamic, head_init_scale=1.)
    model = shard(small_model(name, device='meta', **kwargs).train())
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device='cpu')
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        torch.nn.init.constant_(tensor, torch.nan)  # what is not initialised shows
    torch.manual_seed(0)
    model.init_weights()
    reference = small_model(name, **kwargs)
    reference.init_weights()
    for (key, p), like in zip(model.named_parameters(), reference.parameters()):
        actual, expected = whole(p).square().mean().sqrt(), like.square().mean().sqrt()
        assert abs(actual - expected) <= (0.1 if p.numel() > 1000 else 0.5) * expected, f'{key}: {actual}, {expected}'
    for _ in train(model, dynamic):
        pass


@every_model
def test_model_starts_on_the_meta_device(ranks, name, dynamic):
    ranks.run(train_from_meta_device, name=name, dynamic=dynamic)

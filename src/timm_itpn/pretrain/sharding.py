"""Runs of several processes that share parameters, gradients and optimizer states (FSDP2), and their whole states."""
from typing import Any

import torch.nn as nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..layers.blocks import AttentionBlock, MlpBlock

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # torch 2.5
    from torch.distributed._composable.fsdp import fully_shard

__all__ = ['load_model_state', 'load_optimizer_state', 'model_state', 'optimizer_state', 'shard']

State = dict[str, Any]
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(module: nn.Module) -> None:
    """Divide the parameters among the processes; blocks are the units that are brought together when they run."""
    for block in module.modules():
        if isinstance(block, (AttentionBlock, MlpBlock)):
            fully_shard(block)
    fully_shard(module)


def model_state(module: nn.Module, sharded: bool) -> State:
    """State dict with whole tensors; with `sharded`, every process has to call it, and the first gets it."""
    return get_model_state_dict(module, options=FULL) if sharded else module.state_dict()


def load_model_state(module: nn.Module, state: State, sharded: bool) -> None:
    """The reverse of `model_state`; every process has the state."""
    if sharded:
        set_model_state_dict(module, state, options=FULL)
    else:
        module.load_state_dict(state)


def optimizer_state(module: nn.Module, optimizer: Any, sharded: bool) -> State:
    """State dict of the optimizer of `module`, as `model_state`."""
    return get_optimizer_state_dict(module, optimizer, options=FULL) if sharded else optimizer.state_dict()


def load_optimizer_state(module: nn.Module, optimizer: Any, state: State, sharded: bool) -> None:
    """The reverse of `optimizer_state`."""
    if sharded:
        set_optimizer_state_dict(module, optimizer, state, options=FULL)
    else:
        optimizer.load_state_dict(state)

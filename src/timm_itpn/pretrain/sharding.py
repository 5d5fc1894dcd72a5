"""Runs whose processes share parameters, gradients and optimizer states (FSDP2), and their whole states."""
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard

from ..layers.blocks import AttentionBlock, MlpBlock

__all__ = ['load_model_state', 'load_optimizer_state', 'model_state', 'optimizer_state', 'shard']

State = dict[str, Any]
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(module: nn.Module) -> None:
    """Divide the parameters among the processes; each block's are brought together while it runs."""
    for block in module.modules():
        if isinstance(block, (AttentionBlock, MlpBlock)):
            fully_shard(block)
    fully_shard(module)


def model_state(module: nn.Module) -> State:
    """State dict with whole tensors; of a sharded module, every process has to call it, and the first gets it."""
    return get_model_state_dict(module, options=FULL) if isinstance(module, FSDPModule) else module.state_dict()


def load_model_state(module: nn.Module, state: State) -> None:
    """The reverse of `model_state`; every process has the state."""
    if isinstance(module, FSDPModule):
        set_model_state_dict(module, state, options=FULL)
    else:
        module.load_state_dict(state)


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """State dict of the optimizer of `module`, as `model_state`."""
    if isinstance(module, FSDPModule):
        return get_optimizer_state_dict(module, optimizer, options=FULL)
    return optimizer.state_dict()


def load_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """The reverse of `optimizer_state`."""
    if isinstance(module, FSDPModule):
        set_optimizer_state_dict(module, optimizer, state, options=FULL)
    else:
        optimizer.load_state_dict(state)

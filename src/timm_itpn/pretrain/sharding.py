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

__all__ = ['load_whole_state', 'shard', 'whole_state']

State = dict[str, Any]
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(module: nn.Module) -> None:
    """Divide the parameters among the processes; each block's are brought together while it runs."""
    for block in module.modules():
        if isinstance(block, (AttentionBlock, MlpBlock)):
            fully_shard(block)
    fully_shard(module)


def whole_state(module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> State:
    """State dict, with whole tensors, of a module or of the optimizer of its parameters.

    Of a sharded module, every process has to call it, and the first gets it.
    """
    if not isinstance(module, FSDPModule):
        return (optimizer or module).state_dict()
    if optimizer is None:
        return get_model_state_dict(module, options=WHOLE)
    return get_optimizer_state_dict(module, optimizer, options=WHOLE)


def load_whole_state(state: State, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """The reverse of `whole_state`; every process has the state."""
    if not isinstance(module, FSDPModule):
        (optimizer or module).load_state_dict(state)
    elif optimizer is None:
        set_model_state_dict(module, state, options=WHOLE)
    else:
        set_optimizer_state_dict(module, optimizer, state, options=WHOLE)

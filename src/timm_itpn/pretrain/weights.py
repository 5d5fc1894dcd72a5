"""State dicts of objectives and of files: what only pre-training needs has `pretrain.` before its official name.

The model of a file has no prefix for its backbone; an objective holds it as `backbone`. The average of `mfm` and the
optimizer stay in the checkpoints of a run.
"""
import torch

from ..weights.layout import ITPN, PRETRAIN, Table

__all__ = ['from_native', 'to_native']

StateDict = dict[str, torch.Tensor]
BACKBONE = 'backbone.'
AVERAGE = 'average.'


def _branch() -> dict[str, str]:
    """Names within a block of the auxiliary branch -> official ones."""
    table: Table = ITPN.attention_block
    return {native: official for native, (official,) in table.items()}


def to_native(state_dict: StateDict) -> StateDict:
    """State dict of an objective -> native one, as a file has it."""
    names = _branch()
    native: StateDict = {}
    for key, value in state_dict.items():
        if key.startswith(BACKBONE):
            native[key.removeprefix(BACKBONE)] = value
        elif not key.startswith(AVERAGE):
            native[PRETRAIN + _renamed(key, names)] = value
    return native


def from_native(native: StateDict) -> StateDict:
    """The reverse of `to_native`."""
    names = {official: name for name, official in _branch().items()}
    return {
        _renamed(key.removeprefix(PRETRAIN), names) if key.startswith(PRETRAIN) else BACKBONE + key: value
        for key, value in native.items()}


def _renamed(key: str, names: dict[str, str]) -> str:
    if not key.startswith('cls_pt_layers.'):
        return key
    branch, number, name = key.split('.', 2)
    return f'{branch}.{number}.{names.get(name, name)}'

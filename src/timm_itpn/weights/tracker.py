"""Weights of trackers: stem and stages of a network of this package, positions of several images, and what is theirs.

Native weights made of them are those of a model for the first role. What is the tracker's own is in them behind
`tracking.`, under its names, and so is a position embedding of several roles.
"""
from collections.abc import Mapping
from typing import Any

import torch

from .checkpoint import StateDict
from .layout import ALL_POSITIONS, POS_EMBED, TRACKING, layout_of, native_layout, native_to_official, to_current

ROLE = 'pos_embed.'  # before the name of a role in an encoder


def tracker_to_native(state_dict: StateDict, roles: Mapping[str, tuple[int, int]] | None) -> StateDict:
    """Convert the weights of a tracker's encoder; others come back as they are.

    Args:
        state_dict: In official layout.
        roles: Role -> height and width of an image in pixels, in the order in which the position embedding has the
            tokens; None or empty = it is not of a tracker.
    """
    if not roles or layout_of(state_dict) != 'official':
        return state_dict
    native = to_current(state_dict, unknown=TRACKING)
    num_tokens = [height * width // 256 for height, width in roles.values()]
    positions = native.get(POS_EMBED)
    if positions is not None and len(roles) > 1 and positions.shape[1] == sum(num_tokens):
        native[ALL_POSITIONS] = positions
        native[POS_EMBED] = positions[:, :num_tokens[0]].clone()  # safetensors take no views
    return native


def to_encoder(state_dict: StateDict, encoder: Any) -> StateDict:
    """Convert a tracker's weights, official or native, to the names of a `JointEncoder`; keep those of an encoder.

    What is the tracker's own keeps its name, with `tracking.` before it where the encoder has something else there.
    """
    if layout_of(state_dict) == 'native' and POS_EMBED in state_dict:
        state_dict = native_to_official(to_current(state_dict))
    elif layout_of(state_dict) != 'official':
        return state_dict
    file = dict(state_dict)
    found = _take(file, {theirs: ours for ours, theirs in encoder.names.items()})
    native = to_current(file, unknown=TRACKING)
    roles = [role for role in encoder.grid_sizes if ROLE + role not in encoder.names]
    if POS_EMBED in native and roles:
        found.update(encoder.role_positions(native.pop(POS_EMBED), roles))
    elif POS_EMBED in native:  # other names have the positions of all roles
        found[native_layout(native).ends[POS_EMBED][0]] = native.pop(POS_EMBED)
    for key, value in native.items():
        own = key.removeprefix(TRACKING)
        found[key if own.startswith(('norm.', 'stages.', ROLE)) else own] = value
    return found


def from_encoder(encoder: Any) -> StateDict:
    """The reverse: the weights in official layout."""
    native = encoder.state_dict()
    found = _take(native, encoder.names)
    network = _take(native, {'patch_embed': 'patch_embed', 'stages': 'stages'})
    if positions := [native.pop(ROLE + role) for role in encoder.grid_sizes if ROLE + role in native]:
        network[POS_EMBED] = torch.cat(positions, dim=1)
    return {**native_to_official(network), **native, **found}


def _take(state_dict: StateDict, names: Mapping[str, str]) -> StateDict:
    """Move what has some names out of a dict, to others."""
    return {
        new + key[len(old):]: state_dict.pop(key)
        for old, new in names.items() for key in list(state_dict) if key == old or key.startswith(f'{old}.')}

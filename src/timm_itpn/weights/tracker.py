"""Weights of trackers: a network of this package, tensors of the tracker's own, and positions of several grids in one.

Native weights made of them are those of a model for the first role. Behind `tracking.` they have the tracker's own
tensors, under their names, and the position embedding of all roles.
"""
from collections.abc import Callable, Mapping

import torch

from .checkpoint import StateDict, leave_out
from .layout import ALL_POSITIONS, POS_EMBED, PRETRAIN, PYRAMID, TRACKING, layout_of, to_current

__all__ = ['mark_own', 'to_encoder', 'tracker_to_native']

NETWORK = ('patch_embed.', 'stages.', 'head.', PYRAMID, PRETRAIN, TRACKING)
NORMS = ('pretrain.norm', 'norm_', 'norm', 'head.norm')  # names of a norm after stage 3, the preferred last


def mark_own(native: StateDict) -> StateDict:
    """Put `tracking.` before the names that are not of a network."""
    return {key if key.startswith(NETWORK) else TRACKING + key: value for key, value in native.items()}


def tracker_to_native(state_dict: StateDict, roles: Mapping[str, tuple[int, int]] | None) -> StateDict:
    """Convert the weights of a tracker's encoder; others come back as they are.

    Args:
        state_dict: In official layout.
        roles: Role -> height and width of an image in pixels, in the order in which the position embedding has the
            tokens; None or empty = it is not of a tracker.
    """
    if not roles or layout_of(state_dict) != 'official':
        return state_dict
    native = mark_own(to_current(state_dict, strict=False))  # a tracker has tensors of its own
    num_tokens = [height * width // 256 for height, width in roles.values()]
    positions = native.get(POS_EMBED)
    if positions is not None and len(roles) > 1 and positions.shape[1] == sum(num_tokens):
        native[ALL_POSITIONS] = positions
        native[POS_EMBED] = positions[:, :num_tokens[0]].clone()  # safetensors take no views
    return native


def to_encoder(
        state_dict: StateDict, target: StateDict, role_positions: Callable[[torch.Tensor], StateDict]) -> StateDict:
    """Convert a tracker's weights, official or native, to the names of `JointEncoder`; what is unknown keeps its name.

    Args:
        state_dict: Weights; those of a `JointEncoder` come back as they are.
        target: State dict of the `JointEncoder`.
        role_positions: Makes the position embeddings of its roles of the one in the file.
    """
    if layout_of(state_dict) != 'official' and POS_EMBED not in state_dict:
        return state_dict
    native = to_current(state_dict, strict=False)  # likewise
    positions = native.pop(POS_EMBED, None)
    positions = native.pop(ALL_POSITIONS, positions)
    native = {key.removeprefix(TRACKING): value for key, value in native.items()}
    if positions is not None:
        native.update(role_positions(positions))
    for norm in NORMS:
        found = {f'norm.{leaf}': native.pop(f'{norm}.{leaf}', None) for leaf in ('weight', 'bias')}
        native.update({key: value for key, value in found.items() if value is not None})
    return leave_out(native, target)

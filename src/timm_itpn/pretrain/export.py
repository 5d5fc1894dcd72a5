"""The weights at the end of a run, as files that models load."""
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..engine.checkpoints import save
from ..files import replaced
from ..weights.layout import ITPN, PRETRAIN, native_to_official

__all__ = ['export', 'native_weights']

StateDict = dict[str, Any]
BACKBONE = 'backbone.'
BRANCH = 'cls_pt_layers.'  # the auxiliary branch of `clip-distill`, whose blocks have official names in a file
BRANCH_NAMES = {native: official for native, (official,) in ITPN.attention_block.items()}


def export(folder: Path, state_dict: StateDict, metadata: dict[str, str]) -> dict[str, Path]:
    """Write the weights of an objective in both layouts, with what they are; gives the files by layout."""
    files = {'native': folder / 'pretrained.safetensors', 'official': folder / 'pretrained.pth'}
    native = native_weights(state_dict)
    with replaced(files['native']) as part:
        save_file(native, part, metadata=metadata)
    official = {key: value.clone() for key, value in native_to_official(native).items()}
    save({'model': official, 'args': json.loads(metadata['args'])}, files['official'])
    return files


def native_weights(state_dict: StateDict) -> StateDict:
    """State dict of an objective -> native weights.

    What only pre-training needs has `pretrain.` before its official name; the average of `mfm` is left out.
    """
    native: StateDict = {}
    for key, value in state_dict.items():
        if key.startswith(BACKBONE):
            native[key.removeprefix(BACKBONE)] = value
        elif key.startswith(BRANCH):
            branch, number, name = key.split('.', 2)
            native[f'{PRETRAIN}{branch}.{number}.{BRANCH_NAMES.get(name, name)}'] = value
        elif not key.startswith('average.'):
            native[PRETRAIN + key] = value
    return native

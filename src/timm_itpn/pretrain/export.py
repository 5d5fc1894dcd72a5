"""The weights at the end of a run, as files that models load."""
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from ..files import replaced
from ..weights.layout import ITPN, PRETRAIN, native_to_official
from .checkpoints import REMEDY, not_finite, save
from .run import WHOLE, Run

__all__ = ['export', 'native_weights']

StateDict = dict[str, Any]
BACKBONE = 'backbone.'
BRANCH = 'cls_pt_layers.'  # the auxiliary branch of `clip-distill`, whose blocks have official names in a file
BRANCH_NAMES = {native: official for native, (official,) in ITPN.attention_block.items()}


def export(run: Run) -> dict[str, Any]:
    """Write the weights in both layouts; every process has to call it, the first writes.

    Returns:
        The paths and how far the run got, for JSON; nothing in other processes than the first.
    """
    state_dict = get_model_state_dict(run.objective, options=WHOLE)
    if run.ema is not None:
        averaged = get_model_state_dict(run.ema.module, options=WHOLE)
        state_dict.update({BACKBONE + key: value for key, value in averaged.items()})
    if run.args.rank > 0:
        return {}
    native = {key: value.detach().cpu().contiguous() for key, value in native_weights(state_dict).items()}
    files: dict[str, Path] = {
        'native': run.args.output / 'pretrained.safetensors', 'official': run.args.output / 'pretrained.pth'}
    if bad := not_finite(native):
        raise RuntimeError(f'{bad} is not finite after update {run.num_updates}: no weights are written. {REMEDY}')
    with replaced(files['native']) as part:
        save_file(native, part, metadata={'format': 'pt', 'model': run.args.model})
    save({'model': {key: value.clone() for key, value in native_to_official(native).items()}}, files['official'])
    return {'num_updates': run.num_updates, 'skipped': run.skipped, **{key: str(path) for key, path in files.items()}}


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

""" Checkpoint in, timm Hub folder out; and back to the official layout

The folder holds `model.safetensors` in native layout with all that the checkpoint has (backbone, classifier, pyramid,
what only pre-training needs), `config.json` as timm writes it, and a model card. timm loads it with `local-dir:` and,
once it is on the Hub, with `hf-hub:`.
"""
import argparse
import datetime
import hashlib
import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .. import __version__
from ..weights.checkpoint import AVERAGED, PLAIN, fit_to_model, to_native, unwrap
from ..weights.describe import describe
from ..weights.errors import readable_file_errors
from ..weights.files import replaced
from ..weights.integrity import sha256_of, why_no_weight_file
from ..weights.layout import is_native, is_official, native_to_official
from ._timm import reinit_non_persistent_buffers, save_config_for_hf
from .card import model_card
from .matching import choose_model, model_args

__all__ = ['convert', 'open_checkpoint', 'revert']

WEIGHTS, CONFIG, CARD = 'model.safetensors', 'config.json', 'README.md'


class Checkpoint(NamedTuple):
    """An open weight file.

    Attributes:
        path: The file.
        layout: 'official' or 'native'.
        wrapper: Dotted names of what the state dict was in, '' for nothing.
        others: Names of other state dicts in the file.
        state_dict: In the file's layout.
    """
    path: Path
    layout: str
    wrapper: str
    others: List[str]
    state_dict: Dict[str, torch.Tensor]

    def report(self) -> Dict[str, Any]:
        """What the file is, for JSON."""
        return dict(
            file=self.path.name, sha256=sha256_of(self.path), bytes=self.path.stat().st_size, layout=self.layout,
            wrapper=self.wrapper, others=self.others)


def open_checkpoint(path: Path, ema: bool = False) -> Checkpoint:
    """Open a weight file without running its pickled code; tensors are read when they are needed.

    Args:
        path: File, or folder that holds `model.safetensors`.
        ema: Take the averaged weights; the plain ones are taken otherwise, if there are both.

    Raises:
        RuntimeError: It cannot be read, or holds pickled objects besides tensors.
        ValueError: It holds no weights of a model of this package, or no averaged ones.
    """
    path = path / WEIGHTS if path.is_dir() else path
    with readable_file_errors(path):
        wrong = why_no_weight_file(path)
        if wrong:
            raise RuntimeError(f'{path} is {wrong} ({path.stat().st_size} bytes): fetch or write it again.')
        content = _load(path)
    state_dict, wrapper = unwrap(content, AVERAGED if ema else PLAIN + AVERAGED)
    if ema and not wrapper:
        raise ValueError(f'{path} has no averaged weights ({" or ".join(AVERAGED)}): leave out --ema.')
    layout = 'native' if is_native(state_dict) else 'official' if is_official(state_dict) else ''
    if not layout:
        to_native(state_dict)  # says what it is
    found = [key for key in AVERAGED + PLAIN if isinstance(content.get(key), dict)]
    others = [key for key in found if key != wrapper.partition('.')[0]]
    return Checkpoint(path, layout, wrapper, others, state_dict)


def _load(path: Path) -> Any:
    with open(path, 'rb') as file:
        start = file.read(9)
    if start[8:] == b'{':
        with safe_open(path, framework='pt') as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    with torch.serialization.safe_globals([argparse.Namespace]):  # in most training checkpoints
        return torch.load(path, map_location='cpu', weights_only=True, mmap=start.startswith(b'PK'))


def convert(
        path: Path,
        output: Path,
        name: Optional[str] = None,
        dtype: Optional[torch.dtype] = None,
        ema: bool = False,
        img_size: Optional[Tuple[int, int]] = None,
        verify: bool = False,
) -> Dict[str, Any]:
    """Write a timm Hub folder from a checkpoint.

    Args:
        path: Checkpoint in official or native layout.
        output: New folder; it appears when all is written (and verified).
        name: Model `arch.tag` for published weights, `arch` for others, with or without `_fpn`; None to tell from the
            file.
        dtype: Type of the written tensors, None for that of the file.
        ema: Take the averaged weights.
        img_size: Height and width in pixels that the position embedding is for, None for a square.
        verify: Read the folder again and compare every tensor, and what the model computes.

    Returns:
        What was read and written, for JSON.

    Raises:
        RuntimeError: The file cannot be read, or what was written is not the same.
        ValueError: It does not fit the model, or `output` exists.
    """
    if output.exists():
        raise ValueError(f'{output} exists already: name another folder, or remove it.')
    output.parent.mkdir(parents=True, exist_ok=True)
    with replaced(output) as part:
        part.mkdir()
        report, fingerprint = _write(part, path, name, dtype, ema, img_size, verify)
        if fingerprint is not None:
            _compare(_fingerprint_of_folder(part, report), fingerprint)
    return {'output': str(output), **report, 'verified': verify}


class Fingerprint(NamedTuple):
    """What two copies of the same weights have in common.

    Attributes:
        digests: Key -> hash of the tensor's bytes, shape and type, in the source's layout.
        outputs: Logits (or pooled features) and maps of a fixed image.
    """
    digests: Dict[str, str]
    outputs: List[torch.Tensor]


def _write(
        folder: Path,
        path: Path,
        name: Optional[str],
        dtype: Optional[torch.dtype],
        ema: bool,
        img_size: Optional[Tuple[int, int]],
        verify: bool,
) -> Tuple[Dict[str, Any], Optional[Fingerprint]]:
    """Fill a folder; on return the memory of the source is free again."""
    checkpoint = open_checkpoint(path, ema)
    native = _cast(to_native(checkpoint.state_dict), dtype)
    weights = describe(native)
    guessed = name is None
    name = name or choose_model(weights)
    args = model_args(name, native, weights, img_size)
    report = dict(
        model=name,
        guessed=guessed,
        source=checkpoint.report(),
        dtypes=_dtypes(native),
        parts=weights.parts,
        num_classes=weights.num_classes,
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        tool=f'timm-itpn {__version__}',
    )
    metadata = {'format': 'pt', 'source': checkpoint.path.name, 'source_sha256': report['source']['sha256']}
    save_file({key: value.contiguous() for key, value in native.items()}, folder / WEIGHTS, metadata=metadata)
    _write_config(name, args, folder / CONFIG)
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors leaves it to its owner alone
    (folder / CARD).write_text(model_card(report, weights.pretraining), encoding='utf-8')
    if not verify:
        return report, None
    outputs = _outputs(name, native, pyramid=weights.pyramid_dim > 0, **args)
    return report, Fingerprint(_digests(_cast(checkpoint.state_dict, dtype)), outputs)


def _fingerprint_of_folder(folder: Path, report: Dict[str, Any]) -> Fingerprint:
    state_dict = open_checkpoint(folder).state_dict
    outputs = _outputs(f'local-dir:{folder}', state_dict, pyramid='pyramid' in report['parts'])
    if report['source']['layout'] == 'official':
        state_dict = native_to_official(state_dict)
    return Fingerprint(_digests(state_dict), outputs)


def _digests(state_dict: Dict[str, torch.Tensor]) -> Dict[str, str]:
    digests = {}
    for key, value in state_dict.items():
        if key.endswith('relative_position_index'):
            continue  # it follows from the size of the table, and is in no folder
        data = value.contiguous().flatten().view(torch.uint8).numpy()
        digests[key] = f'{hashlib.sha256(data).hexdigest()} {tuple(value.shape)} {value.dtype}'
    return digests


def _outputs(name: str, native: Dict[str, torch.Tensor], **args: Any) -> List[torch.Tensor]:
    """Outputs of a model that takes these tensors, without a copy of them."""
    # allocated but not written to, so it takes no memory: the tensors take its place
    model = timm.create_model(name, device='meta', **args).to_empty(device='cpu')
    reinit_non_persistent_buffers(model)
    model.head.norm.reset_parameters()  # starts new if the weights have none
    model.load_state_dict(fit_to_model(native, model), assign=True)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, model.in_chans, *model.patch_embed.img_size, generator=generator)
    with torch.inference_mode():
        last, maps = model.float().eval().forward_intermediates(image)
        return [model.forward_head(last), *maps]


def _compare(written: Fingerprint, expected: Fingerprint) -> None:
    """Raise RuntimeError unless tensors are the same to the bit, and outputs to float32 error."""
    keys = sorted({*written.digests, *expected.digests})
    differing = [key for key in keys if written.digests.get(key) != expected.digests.get(key)]
    if differing:
        raise RuntimeError(f'What was written differs from the checkpoint in {", ".join(differing)}: it was not kept.')
    if not all(output.isfinite().all() for output in expected.outputs):
        raise RuntimeError('The outputs for a fixed image are not finite: the weights are broken, nothing was kept.')
    pairs = zip(written.outputs, expected.outputs)
    # to float32 error only: tensors lie at other addresses in the two files, and kernels round by alignment
    if not all((ours - theirs).abs().max() <= 1e-4 * theirs.std() for ours, theirs in pairs):
        raise RuntimeError('What was written gives other outputs than the checkpoint: it was not kept.')


def _cast(state_dict: Dict[str, torch.Tensor], dtype: Optional[torch.dtype]) -> Dict[str, torch.Tensor]:
    return {key: value.to(dtype or value.dtype) for key, value in state_dict.items()}


def _dtypes(state_dict: Dict[str, torch.Tensor]) -> List[str]:
    return sorted({str(value.dtype).removeprefix('torch.') for value in state_dict.values()})


def _write_config(name: str, args: Dict[str, Any], path: Path) -> None:
    save_config_for_hf(timm.create_model(name, device='meta', **args), path)
    config = json.loads(path.read_text(encoding='utf-8'))
    config['model_args'].pop('num_classes')  # it stands beside them too; transformers 5.23 fails on having it twice
    path.write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def revert(
        path: Path,
        output: Path,
        dtype: Optional[torch.dtype] = None,
        ema: bool = False,
        verify: bool = False,
) -> Dict[str, Any]:
    """Write a checkpoint in official layout, `{'model': state dict}`, from a folder or a checkpoint in native layout.

    Args:
        path: Folder that `convert` wrote, or weight file.
        output: New file.
        dtype: Type of the written tensors, None for that of the source.
        ema: Take the averaged weights.
        verify: Read the file again and compare every tensor.

    Returns:
        What was read and written, for JSON.

    Raises:
        RuntimeError: The file cannot be read, or what was written is not the same.
        ValueError: It is in official layout already, has unknown keys, or `output` exists.
    """
    if output.exists():
        raise ValueError(f'{output} exists already: name another file, or remove it.')
    output.parent.mkdir(parents=True, exist_ok=True)
    with replaced(output) as part:
        report, digests = _write_official(part, path, dtype, ema)
        if verify:
            written = to_native(open_checkpoint(part).state_dict)
            _compare(Fingerprint(_digests(written), []), Fingerprint(digests, []))
    return {'output': str(output), **report, 'sha256': sha256_of(output), 'verified': verify}


def _write_official(
        output: Path, path: Path, dtype: Optional[torch.dtype], ema: bool) -> Tuple[Dict[str, Any], Dict[str, str]]:
    """Write the file; return what it is, and digests of the native tensors."""
    checkpoint = open_checkpoint(path, ema)
    if checkpoint.layout == 'official':
        raise ValueError(f'{checkpoint.path} is in official layout already.')
    native = _cast(checkpoint.state_dict, dtype)
    official = native_to_official(native)
    for key, value in official.items():
        if value.nbytes < value.untyped_storage().nbytes():  # a part of a tensor would be saved with the whole
            official[key] = value.clone()
    torch.save({'model': official}, output)
    report = dict(source=checkpoint.report(), dtypes=_dtypes(official), parts=describe(native).parts)
    return report, _digests(native)

""" Checkpoint in, timm Hub folder out; and back to the official layout

The folder holds `model.safetensors` in native layout with all that the checkpoint has (backbone, classifier, pyramid,
what only pre-training needs), `config.json` as timm writes it, and a model card. timm loads it with `local-dir:` and,
once it is on the Hub, with `hf-hub:`.
"""
import datetime
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .. import __version__
from ..files import replaced
from ..models._timm import reinit_non_persistent_buffers, save_config_for_hf
from ..weights.checkpoint import fit_to_model, to_native
from ..weights.integrity import sha256_of
from ..weights.layout import native_to_official
from .card import model_card
from .checkpoint_file import CONFIG, WEIGHTS, open_checkpoint
from .describe import describe
from .match import choose_model, matching_models, model_args, why_not_published

__all__ = ['convert', 'revert']

CARD = 'README.md'


def convert(
        path: Path,
        output: Path,
        name: str | None = None,
        dtype: torch.dtype | None = None,
        ema: bool = False,
        img_size: tuple[int, int] | None = None,
        verify: bool = False,
) -> dict[str, Any]:
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
    if os.path.lexists(output):
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
    digests: dict[str, str]
    outputs: list[torch.Tensor]


def _write(
        folder: Path,
        path: Path,
        name: str | None,
        dtype: torch.dtype | None,
        ema: bool,
        img_size: tuple[int, int] | None,
        verify: bool,
) -> tuple[dict[str, Any], Fingerprint | None]:
    """Fill a folder; on return the memory of the source is free again."""
    checkpoint = open_checkpoint(path, ema)
    native = _cast(to_native(checkpoint.state_dict), dtype)
    weights = describe(native)
    guessed = name is None
    name = name or checkpoint.name or choose_model(weights, checkpoint.published)
    args = model_args(name, native, weights, img_size or checkpoint.img_size)
    if '.' in name:
        wrong = why_not_published(name, weights) if checkpoint.published else 'it is in native layout'
        if wrong:
            raise ValueError(
                f'{checkpoint.path} is not the published file of {name}: {wrong}. For weights of your own, name the '
                f'model without tag: --model {name.partition(".")[0]}.')
    if checkpoint.global_pool:
        args['global_pool'] = checkpoint.global_pool
    report = dict(
        model=name,
        guessed=guessed,
        global_pool=checkpoint.global_pool or 'avg',
        source=checkpoint.report(),
        dtypes=_dtypes(native),
        parts=weights.parts,
        num_classes=weights.num_classes,
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        tool=f'timm-itpn {__version__}',
    )
    source = checkpoint.origin or report['source']
    metadata = {'format': 'pt', 'model': name, 'source': source['file'], 'source_sha256': source['sha256']}
    with _writing(folder.parent.parent):
        save_file({key: value.contiguous() for key, value in native.items()}, folder / WEIGHTS, metadata=metadata)
    _write_config(name, args, folder / CONFIG)
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors leaves it to its owner alone
    (folder / CARD).write_text(model_card(report, weights.pretraining), encoding='utf-8')
    if not verify:
        return report, None
    outputs = _outputs(name, native, pyramid=weights.pyramid_dim > 0, **args)
    return report, Fingerprint(_digests(_cast(checkpoint.state_dict, dtype)), outputs)


def _fingerprint_of_folder(folder: Path, report: dict[str, Any]) -> Fingerprint:
    state_dict = open_checkpoint(folder).state_dict
    outputs = _outputs(f'local-dir:{folder}', state_dict, pyramid='pyramid' in report['parts'])
    if report['source']['layout'] == 'official':
        state_dict = native_to_official(state_dict)
    return Fingerprint(_digests(state_dict), outputs)


def _digests(state_dict: dict[str, torch.Tensor]) -> dict[str, str]:
    digests = {}
    for key, value in state_dict.items():
        if key.endswith('relative_position_index'):
            continue  # it follows from the size of the table, and is in no folder
        data = value.contiguous().flatten().view(torch.uint8).numpy()
        digests[key] = f'{hashlib.sha256(data).hexdigest()} {tuple(value.shape)} {value.dtype}'
    return digests


def _outputs(name: str, native: dict[str, torch.Tensor], **args: Any) -> list[torch.Tensor]:
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
    if not all((ours - theirs).abs().max() <= 1e-4 * theirs.abs().max() for ours, theirs in pairs):
        raise RuntimeError('What was written gives other outputs than the checkpoint: it was not kept.')


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn what the writers of weights raise on a full disk into one sentence."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RuntimeError(
            f'The weights could not be written to {folder.absolute()} ({str(error).splitlines()[0]}): free space there '
            'or name another place with -o.') from error


def _cast(state_dict: dict[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The tensors in another type; ValueError if one does not fit in it."""
    cast = {key: value.to(dtype or value.dtype) for key, value in state_dict.items()}
    for key, value in cast.items() if dtype else ():
        if not value.isfinite().all() and state_dict[key].isfinite().all():
            raise ValueError(f'{key} has values that {dtype} cannot hold: choose another --dtype.')
    return cast


def _dtypes(state_dict: dict[str, torch.Tensor]) -> list[str]:
    return sorted({str(value.dtype).removeprefix('torch.') for value in state_dict.values()})


def _write_config(name: str, args: dict[str, Any], path: Path) -> None:
    save_config_for_hf(timm.create_model(name, device='meta', **args), path)
    config = json.loads(path.read_text(encoding='utf-8'))
    config['model_args'].pop('num_classes')  # it stands beside them too; transformers 5.23 fails on having it twice
    path.write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def revert(
        path: Path,
        output: Path,
        dtype: torch.dtype | None = None,
        ema: bool = False,
        img_size: tuple[int, int] | None = None,
        verify: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint in official layout, `{'model': state dict}`, from a folder or a checkpoint in native layout.

    Args:
        path: Folder that `convert` wrote, or weight file.
        output: New file.
        dtype: Type of the written tensors, None for that of the source.
        ema: Take the averaged weights.
        img_size: Height and width in pixels that the position embedding is for, None for a square, or for what the
            folder says.
        verify: Read the file again and compare every tensor.

    Returns:
        What was read and written, for JSON.

    Raises:
        RuntimeError: The file cannot be read, or what was written is not the same.
        ValueError: It is in official layout already, has unknown keys or lacks some, or `output` exists.
    """
    if os.path.lexists(output):
        raise ValueError(f'{output} exists already: name another file, or remove it.')
    output.parent.mkdir(parents=True, exist_ok=True)
    with replaced(output) as part:
        report, digests = _write_official(part, path, dtype, ema, img_size)
        if verify:
            written = to_native(open_checkpoint(part).state_dict)
            _compare(Fingerprint(_digests(written), []), Fingerprint(digests, []))
    return {'output': str(output), **report, 'sha256': sha256_of(output), 'verified': verify}


def _write_official(
        output: Path,
        path: Path,
        dtype: torch.dtype | None,
        ema: bool,
        img_size: tuple[int, int] | None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Write the file; return what it is, and digests of the native tensors."""
    checkpoint = open_checkpoint(path, ema)
    if checkpoint.layout == 'official':
        raise ValueError(f'{checkpoint.path} is in official layout already.')
    native = _cast(checkpoint.state_dict, dtype)
    weights = describe(native)
    names = [checkpoint.name] if checkpoint.name else matching_models(weights, published=False)
    if names:  # if it is of a registered model, it must have all of it
        model_args(names[0], native, weights, img_size or checkpoint.img_size)
    official = native_to_official(native)
    for key, value in official.items():
        if value.nbytes < value.untyped_storage().nbytes():  # a part of a tensor would be saved with the whole
            official[key] = value.clone()
    with _writing(output.parent.parent):
        torch.save({'model': official}, output)
    report = dict(source=checkpoint.report(), dtypes=_dtypes(official), parts=weights.parts)
    return report, _digests(native)

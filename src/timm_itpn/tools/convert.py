""" Checkpoint in, timm Hub folder out; and back to the official layout

The folder holds `model.safetensors` in native layout with all that the checkpoint has (backbone, classifier, pyramid,
what only pre-training needs), `config.json` as timm writes it, and a model card. timm loads it with `local-dir:` and,
once it is on the Hub, with `hf-hub:`.
"""
import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from .. import __version__
from ..files import created
from ..models._timm import save_config_for_hf
from ..weights.checkpoint import StateDict, fit_to_model, to_native
from ..weights.layout import native_to_official
from ..weights.read import read_contents
from ..weights.sources import sha256_of
from .card import model_card
from .checkpoint_file import CONFIG, WEIGHTS, Checkpoint, open_checkpoint
from .match import choose_model, matching_models, model_args, why_not_published
from .settings import DATA, check_data, class_names

__all__ = ['convert', 'revert']

CARD = 'README.md'
Digests = dict[str, str]  # key -> hash of the tensor's bytes, its shape and type, in the layout of the source


def convert(
        path: Path,
        output: Path,
        name: str | None = None,
        verify: bool = False,
        data: dict[str, Any] | None = None,
        class_map: Path | None = None,
        **opening: Any,
) -> dict[str, Any]:
    """Write a timm Hub folder from a checkpoint.

    Args:
        path: Checkpoint in official or native layout.
        output: New folder; it appears when all is written (and verified).
        name: Model `arch.tag` for published weights, `arch` for others, with or without `_fpn`; None to tell from the
            file.
        verify: Read the folder again and compare every tensor, and what the model computes.
        data: How images are prepared, by the names in `settings.DATA`, in place of what the checkpoint says.
        class_map: Text file with the names of the classes, one per line.
        opening: `dtype`, `ema`, `img_size`, `prefix` and `roles` of `open_checkpoint`.

    Returns:
        What was read and written, for JSON.

    Raises:
        RuntimeError: The file is damaged, or what was written is not the same.
        ValueError: It cannot be read, does not fit the model, has settings that cannot be, or `output` exists.
    """
    with created(output, '-o') as part:
        part.mkdir()
        report, digests, outputs = _write(part, open_checkpoint(path, **opening), name, verify, data or {}, class_map)
        if verify:
            native = to_native(read_contents(part / WEIGHTS).tree)
            _compare(native_to_official(native) if report['source']['layout'] == 'official' else native, digests)
            _compare_outputs(_outputs(f'local-dir:{part}', native, pyramid='pyramid' in report['parts']), outputs)
    return {'output': str(output), **report, 'verified': verify}


def _write(
        folder: Path,
        checkpoint: Checkpoint,
        name: str | None,
        verify: bool,
        data: dict[str, Any],
        class_map: Path | None,
) -> tuple[dict[str, Any], Digests, list[torch.Tensor]]:
    """Fill a folder; return what was read and written, and if asked to verify what to compare with.

    The caller keeps no reference to the checkpoint, so its memory is free on return.
    """
    native, weights, said, source = checkpoint.native, checkpoint.weights, checkpoint.said, checkpoint.source
    guessed = name is None and not checkpoint.name
    if name is None:
        name = checkpoint.name or choose_model(weights, checkpoint.published)
    args = model_args(name, native, weights, checkpoint.img_size, said.model_args)
    check_data(data, weights.in_chans, 'the command line')
    check_data({key: said.data[key] for key in said.data.keys() - data.keys()}, weights.in_chans, said.source)
    if '.' in name:
        wrong = why_not_published(name, weights) if checkpoint.published else 'it is in native layout'
        if wrong:
            raise ValueError(
                f'{checkpoint.path} is not the published file of {name}: {wrong}. For weights of your own, name the '
                f'model without tag: --model {name.partition(".")[0]}.')
    labels = said.labels if class_map is None else {'label_names': class_names(class_map, weights.num_classes)}
    images = {**said.data, **data}
    if said.input_size and args.get('dynamic_img_size'):
        images['input_size'] = (weights.in_chans, *said.input_size)
    report = dict(
        model=name,
        guessed=guessed,
        global_pool=args.get('global_pool', 'avg'),
        source=source,
        dtypes=_dtypes(native),
        parts=weights.parts,
        num_classes=weights.num_classes,
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        tool=f'timm-itpn {__version__}',
    )
    origin = source['origin'] or source
    metadata = {'format': 'pt', 'model': name, 'source': origin['file'], 'source_sha256': origin['sha256']}
    save_file({key: value.contiguous() for key, value in native.items()}, folder / WEIGHTS, metadata=metadata)
    written = _write_config(name, args, folder / CONFIG, images, labels)
    report['settings'] = {
        'the command line': data,
        said.source: {key: value for key, value in {**said.model_args, **images}.items() if key not in data},
        "the model's defaults": {key: written[key] for key in DATA if key not in images}}
    report['class_map'] = said.class_map if not labels else ''
    report['trained_from'] = said.model if ':' in said.model else ''  # a folder, whose config is not in the checkpoint
    (folder / CARD).write_text(model_card(report, weights.pretraining), encoding='utf-8')
    if not verify:
        return report, {}, []
    return report, _digests(checkpoint.state_dict), _outputs(name, native, pyramid=weights.pyramid_dim > 0, **args)


def _digests(state_dict: StateDict) -> Digests:
    digests = {}
    for key, value in state_dict.items():
        if key.endswith('relative_position_index'):
            continue  # it follows from the size of the table, and is in no folder
        data = value.contiguous().flatten().view(torch.uint8).numpy()
        digests[key] = f'{hashlib.sha256(data.data).hexdigest()} {tuple(value.shape)} {value.dtype}'
    return digests


def _outputs(name: str, native: StateDict, **args: Any) -> list[torch.Tensor]:
    """Outputs of a model that takes these tensors, without a copy of them."""
    # allocated but not written to, so it takes no memory: the tensors take its place
    model: Any = timm.create_model(name, device='meta', **args).to_empty(device='cpu')
    model.head.norm.reset_parameters()  # starts new if the weights have none
    model.load_state_dict(fit_to_model(native, model), assign=True)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, model.in_chans, *model.patch_embed.img_size, generator=generator)
    with torch.inference_mode():
        last, maps = model.float().eval().forward_intermediates(image)
        return [model.forward_head(last), *maps]


def _compare(written: StateDict, expected: Digests) -> None:
    """Raise RuntimeError unless tensors are the same to the bit."""
    found = _digests(written)
    differing = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
    if differing:
        raise RuntimeError(f'What was written differs from the checkpoint in {", ".join(differing)}: it was not kept.')


def _compare_outputs(written: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Raise RuntimeError unless outputs are the same to float32 error.

    They are not to the bit: tensors lie at other addresses in the two files, and kernels round by alignment.
    """
    if not all(output.isfinite().all() for output in expected):
        raise RuntimeError('The outputs for a fixed image are not finite: the weights are broken, nothing was kept.')
    if not all((ours - theirs).abs().max() <= 1e-4 * theirs.abs().max() for ours, theirs in zip(written, expected)):
        raise RuntimeError('What was written gives other outputs than the checkpoint: it was not kept.')


def _dtypes(state_dict: StateDict) -> list[str]:
    return sorted({str(value.dtype).removeprefix('torch.') for value in state_dict.values()})


def _write_config(
        name: str, args: dict[str, Any], path: Path, images: dict[str, Any], labels: dict[str, Any]) -> dict[str, Any]:
    """Write timm's config; return what it says of images."""
    model = timm.create_model(name, device='meta', **args)
    save_config_for_hf(model, str(path), labels, data_config=images)
    config = json.loads(path.read_text(encoding='utf-8'))
    config['model_args'].pop('num_classes', None)  # it stands beside them; transformers 5.23 fails on having it twice
    path.write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
    return config['pretrained_cfg']


def revert(path: Path, output: Path, verify: bool = False, **opening: Any) -> dict[str, Any]:
    """Write a checkpoint in official layout, `{'model': state dict}`, from a folder or a checkpoint in native layout.

    Args:
        path: Folder that `convert` wrote, or weight file.
        output: New file.
        verify: Read the file again and compare every tensor.
        opening: `dtype`, `ema`, `img_size` and `prefix` of `open_checkpoint`.

    Returns:
        What was read and written, for JSON.

    Raises:
        RuntimeError: The file is damaged, or what was written is not the same.
        ValueError: It cannot be read, is in official layout already, has unknown keys or lacks some, or `output`
            exists.
    """
    with created(output, '-o') as part:
        report, digests = _write_official(part, open_checkpoint(path, **opening))
        if verify:
            _compare(read_contents(part).tree['model'], digests)
    return {'output': str(output), **report, 'sha256': sha256_of(output), 'verified': verify}


def _write_official(output: Path, checkpoint: Checkpoint) -> tuple[dict[str, Any], Digests]:
    """Write the file; return what it is, and digests of its tensors."""
    if checkpoint.source['layout'] == 'official':
        raise ValueError(f'{checkpoint.path} is in official layout already.')
    native, weights = checkpoint.native, checkpoint.weights
    names = [checkpoint.name] if checkpoint.name else matching_models(weights, published=False)
    if names:  # if it is of a registered model, it must have all of it
        model_args(names[0], native, weights, checkpoint.img_size, checkpoint.said.model_args)
    official = native_to_official(native)
    for key, value in official.items():
        if value.nbytes < value.untyped_storage().nbytes():  # a part of a tensor would be saved with the whole
            official[key] = value.clone()
    torch.save({'model': official}, output)
    report = dict(source=checkpoint.source, dtypes=_dtypes(official), parts=weights.parts)
    return report, _digests(official)

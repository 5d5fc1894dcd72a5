"""Checkpoint in, timm Hub folder out; and back to the official layout.

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
from ..models._timm import generate_readme, save_config_for_hf
from ..models.itpn import PAPERS
from ..weights.checkpoint import StateDict, fit_to_model, to_native
from ..weights.layout import native_to_official
from ..weights.read import read_contents
from ..weights.sources import Source, drive_url, hash_check, sha256_of, source_of
from .checkpoint_file import CONFIG, DATA, WEIGHTS, Checkpoint, check_data, class_names, open_checkpoint
from .match import choose_model, matching_models, model_args, why_not_published

CARD = 'README.md'
CITATION = """@misc{{{family},
  title={{{title}}},
  note={{arXiv:{arxiv}}}
}}"""
USAGE = """```python
import timm  # with timm-itpn installed

model = timm.create_model('hf-hub:OWNER/NAME', pretrained=True{arguments})
# with a feature pyramid, if the weights have one: pyramid=True, features_only=True
```"""


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
        data: How images are prepared, by the names in `checkpoint_file.DATA`, in place of what the checkpoint says.
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
        checkpoint = open_checkpoint(path, **opening)
        report, args = _write(part, checkpoint, name, data or {}, class_map)
        if verify:
            pyramid = 'pyramid' in report['parts']
            digests = _digests(checkpoint.state_dict)
            outputs = _outputs(report['model'], checkpoint.native, pyramid=pyramid, **args)
            del checkpoint  # its memory is free before the result is read
            native = to_native(read_contents(part / WEIGHTS).tree)
            _compare(native_to_official(native) if report['source']['layout'] == 'official' else native, digests)
            _compare_outputs(_outputs(f'local-dir:{part}', native, pyramid=pyramid), outputs)
    return {'output': str(output), **report, 'verified': verify}


def _write(
        folder: Path,
        checkpoint: Checkpoint,
        name: str | None,
        data: dict[str, Any],
        class_map: Path | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fill a folder; return what was read and written, and the arguments of the model."""
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
    origin = source['origin'] or source
    metadata = {'format': 'pt', 'model': name, 'source': origin['file'], 'source_sha256': origin['sha256']}
    save_file({key: value.contiguous() for key, value in native.items()}, folder / WEIGHTS, metadata=metadata)
    written = _write_config(name, args, folder / CONFIG, images, labels)
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
        settings={
            'the command line': data,
            said.source: {key: value for key, value in {**said.model_args, **images}.items() if key not in data},
            "the model's defaults": {key: written[key] for key in DATA if key not in images},
        },
        class_map=said.class_map if not labels else '',
        trained_from=said.model if ':' in said.model else '',  # a folder, whose config is not in the checkpoint
    )
    (folder / CARD).write_text(_model_card(report, weights.pretraining), encoding='utf-8')
    return report, args


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


def _digests(state_dict: StateDict) -> dict[str, str]:
    """Key -> hash of the tensor's bytes, its shape and type; without indices, which follow from sizes."""
    digests = {}
    for key, value in state_dict.items():
        if not key.endswith('relative_position_index'):
            data = value.contiguous().flatten().view(torch.uint8).numpy()
            digests[key] = f'{hashlib.sha256(data.data).hexdigest()} {tuple(value.shape)} {value.dtype}'
    return digests


def _compare(written: StateDict, expected: dict[str, str]) -> None:
    """Raise RuntimeError unless tensors are the same to the bit as those of which the digests are."""
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


def _model_card(report: dict[str, Any], pretraining: bool) -> str:
    """Text of the README of a Hub repository.

    Args:
        report: What was read and written.
        pretraining: True for weights without classifier, as pre-training leaves them.
    """
    name = report['model']
    family = next(family for family in PAPERS if name.startswith(family))
    arxiv, title = PAPERS[family]
    published = source_of(name)
    details: dict[str, Any] = {
        'Model': f'`{name}` of the timm plugin timm-itpn',
        'Parts': [f'{part}: {number:,} values' for part, number in report['parts'].items()],
        'Classes': report['num_classes'] or 'none: norm and classifier start new',
        'Data type': ', '.join(report['dtypes']),
        'Provenance': _provenance(report, published),
    }
    if published:
        details['Contents'] = published.contents
        details['License of the weights, as their authors state it'] = published.license
        figures = [f'{what}: {value}' for what, value in published.figures.items()]
        details['Reported by the authors, not measured for this copy'] = figures
    card = dict(
        tags=['timm', family.replace('_', '-')],
        license=published.license if published else 'unknown',
        details=details,
        usage=USAGE.format(arguments=', num_classes=10' if pretraining else ''),
        citation=CITATION.format(family=family, title=title, arxiv=arxiv),
    )
    return generate_readme(card, name, task_name=f'image-{"feature-extraction" if pretraining else "classification"}')


def _provenance(report: dict[str, Any], published: Source | None) -> list[str]:
    source, origin = report['source'], report['source']['origin']
    layout = f'{source["layout"]} layout' + (f', under `{source["wrapper"]}`' if source['wrapper'] else '')
    lines = [f'Converted from `{source["file"]}` ({source["bytes"]:,} bytes, {layout}), SHA-256 `{source["sha256"]}`']
    if origin:
        lines.append(f'That file says that it was converted from `{origin["file"]}`, SHA-256 `{origin["sha256"]}`')
    lines.append(f'On {report["date"]}, by {report["tool"]}')
    if published is None:
        return [*lines, 'Not a published file of the authors, as far as was said at the conversion']
    taken = 'Taken by its shapes for' if report['guessed'] else 'Said at the conversion to be'
    return [
        *lines,
        f'{taken} the file that the authors publish at {drive_url(published)}',
        f'Its SHA-256 {hash_check((origin or source)["sha256"], report["model"])}',
    ]


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
        checkpoint = open_checkpoint(path, **opening)
        if checkpoint.source['layout'] == 'official':
            raise ValueError(f'{checkpoint.path} is in official layout already.')
        native, weights = checkpoint.native, checkpoint.weights
        names = [checkpoint.name] if checkpoint.name else matching_models(weights, published=False)
        if names:  # if it is of a registered model, it must have all of it
            model_args(names[0], native, weights, checkpoint.img_size, checkpoint.said.model_args)
        official = {  # a part of a tensor would be saved with the whole
            key: value.clone() if value.nbytes < value.untyped_storage().nbytes() else value
            for key, value in native_to_official(native).items()}
        torch.save({'model': official}, part)
        report = dict(source=checkpoint.source, dtypes=_dtypes(official), parts=weights.parts)
        if verify:
            digests = _digests(official)
            del checkpoint, native, official  # likewise
            _compare(read_contents(part).tree['model'], digests)
    return {'output': str(output), **report, 'sha256': sha256_of(output), 'verified': verify}

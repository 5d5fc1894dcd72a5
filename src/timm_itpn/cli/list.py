"""`timm-itpn list`: the models, where their published weights are, and which are on this machine."""
import argparse
import functools
import json
import sys
from typing import Any

from ..bench.rows import table  # it imports no torch

HEADER = ('name', 'classes', 'params', 'input', 'weights', 'bytes', 'cached', 'SHA-256', 'license')


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser('list', help='list the models, and where the weights of each are')
    parser.add_argument('filter', nargs='?', default='', metavar='FILTER', help="name or wildcards, such as '*_fpn'")
    parser.add_argument('--json', action='store_true', help='print all that is known as JSON')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import timm

    from ..models import MODULES  # its package registers them even where TIMM_ITPN_AUTOLOAD=0

    names = timm.list_models(args.filter, module=MODULES, include_tags=True)
    if not names:
        raise ValueError(f'no model is named {args.filter!r}: list them all with: timm-itpn list')
    models = [facts(name) for name in names]
    if args.json:
        print(json.dumps(models, indent=2))
        return
    print(table(HEADER, map(row, models)))
    print(
        'params: with the number of classes in the row (0: no classifier); _fpn models without their pyramid, which '
        'features_only=True adds', file=sys.stderr)


def facts(name: str) -> dict[str, Any]:
    """What is known of a model `arch.tag`, or `arch` without published weights."""
    import timm

    from ..weights.fetch import cached
    from ..weights.sources import Source, drive_url, source_of

    cfg: Any = timm.models.get_pretrained_cfg(name)
    source, file = source_of(name), cached(name)
    known = source._asdict() if source else dict.fromkeys(Source._fields)
    return {
        'name': name,
        'num_classes': cfg.num_classes,
        'num_params': _num_params(cfg.architecture.removesuffix('_fpn'), cfg.num_classes),
        'input_size': cfg.input_size,
        'cached': None if file is None else str(file),
        'drive_url': drive_url(source) if source else None,
        **{key: value or None for key, value in known.items()},
        'license': cfg.license,
    }


@functools.cache
def _num_params(architecture: str, num_classes: int) -> int:
    """Parameters of a model, whose weights are not made."""
    import timm

    model = timm.create_model(architecture, num_classes=num_classes, device='meta')
    return sum(parameter.numel() for parameter in model.parameters())


def row(model: dict[str, Any]) -> list[str]:
    weights = f'Hub {model["hub_repo"]}' if model['hub_repo'] else 'Google Drive' if model['drive_url'] else 'none'
    return [
        model['name'],
        f'{model["num_classes"]:,}',
        f'{model["num_params"]:,}',
        ' x '.join(map(str, model['input_size'])),
        weights,
        f'{model["bytes"]:,}' if model['bytes'] else '',
        'yes' if model['cached'] else 'no',
        'known' if model['sha256'] else 'unknown' if model['drive_url'] else '',
        model['license'],
    ]

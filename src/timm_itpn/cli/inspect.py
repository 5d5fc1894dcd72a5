"""`timm-itpn inspect`: show what is in a checkpoint, without running its code or reading its tensors."""
import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..checks import printable
from .arguments import PREFIX_HELP, ROLE_HELP, sizes_of_roles

MAX_LINES = 12
LAYOUTS = {'official': "official (the authors' names)", 'native': 'native (the names of this package)'}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        'inspect', help='show what is in a checkpoint',
        description='Show what is in a checkpoint. None of its code is run, so it may be from anyone.')
    parser.add_argument(
        'file', type=Path, metavar='FILE', help='weight file of any kind, or a folder that `timm-itpn convert` wrote')
    parser.add_argument(
        '--model', metavar='NAME', help='compare with this model, ARCH.TAG or ARCH (default: told from the file)')
    parser.add_argument('--prefix', metavar='PREFIX', help=PREFIX_HELP)
    parser.add_argument('--role', action='append', default=[], metavar='NAME=SIZE', help=ROLE_HELP)
    parser.add_argument('--json', action='store_true', help='print the same as JSON')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..tools.inspect import inspect

    facts = inspect(args.file, args.model, args.prefix, sizes_of_roles(args.role))
    print(json.dumps(facts, indent=2) if args.json else table(facts))
    remark = next_command(args.file, facts, args.prefix, args.role)
    if remark:
        print(remark, file=sys.stderr)


def table(facts: dict[str, Any]) -> str:
    found = facts['network']
    rows: list[tuple[str, list[str]]] = [
        ('file', [facts['file']]),
        ('format', [facts['format']]),
        ('size', [f'{facts["bytes"]:,} bytes']),
        ('SHA-256', [facts['sha256'], facts['hash_check']]),
        ('metadata', listed(f'{key}: {value}' for key, value in facts['metadata'].items())),
        ('pickled names', listed(facts['globals'])),
        ('weights', [f'under {facts["wrapper"]}'] if facts['wrapper'] else []),
        ('besides', listed(f'{name}: {value}' for name, value in facts['others'].items())),
        ('tensors', [f'{facts["num_tensors"]:,} with {facts["num_values"]:,} values']),
        ('dtypes', [f'{dtype}: {number:,} tensors' for dtype, number in facts['dtypes'].items()]),
        ('first keys', [] if found else facts['first_keys']),
        ('layout', [LAYOUTS[facts['layout']]] if facts['layout'] else []),
    ]
    if found:
        fitting = [f'{model["name"]}{with_args(model["args"])}' for model in facts['models'] if model['fits']]
        rows += [
            ('network', [f'{found["family"]}, embed_dim {found["embed_dim"]}, depths {list(found["depths"])}']),
            ('input', [f'{found["in_chans"]} channels, position embedding of {found["num_tokens"]} tokens']),
            ('classes', [str(found['num_classes'] or 'no classifier')]),
            ('parts', [f'{part}: {number:,} values' for part, number in facts['parts'].items()]),
            ('fits', fitting or ['no registered model']),
        ]
    rows += [
        ('does not fit', [f'{model["name"]}: {model["problem"]}' for model in facts['models'] if not model['fits']]),
        ('problem', [facts['problem']] if facts['problem'] else []),
        ('notes', facts['notes']),
    ]
    shown = [(name, lines) for name, lines in rows if lines]
    width = max(len(name) for name, _ in shown)
    return '\n'.join(
        f'{"" if i else name:<{width}}  {printable(line)}' for name, lines in shown for i, line in enumerate(lines))


def with_args(args: dict[str, Any]) -> str:
    """The arguments that a model is created with."""
    return ' with ' + ', '.join(f'{key}={value}' for key, value in args.items()) if args else ''


def listed(lines: Iterable[str]) -> list[str]:
    found = list(lines)
    more = len(found) - MAX_LINES
    return found if more <= 0 else [*found[:MAX_LINES], f'and {more:,} more']


def next_command(path: Path, facts: dict[str, Any], prefix: str | None = None, roles: Iterable[str] = ()) -> str:
    """What to do next, '' if there is nothing."""
    fitting = [model['name'] for model in facts['models'] if model['fits']]
    name = facts['model']
    if path.is_dir() and fitting:
        return f"load it with: timm.create_model('local-dir:{path}', pretrained=True)"
    if name not in fitting:
        return f'choose a model with --model: {" or ".join(fitting)}' if fitting and not name else ''
    options = [*(('--prefix', prefix) if prefix else ()), *(part for role in roles for part in ('--role', role))]
    return f'convert it with: {shlex.join(["timm-itpn", "convert", str(path), *options, "--model", name, "-o", name])}'

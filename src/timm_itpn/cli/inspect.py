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
NAMES = {'globals': 'pickled names', 'wrapper': 'under', 'others': 'besides'}  # of facts


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
    """Facts as lines to read: names and values, without the empty ones and 'model', which is among 'models'."""
    rows = [(NAMES.get(key, key.replace('_', ' ')), in_lines(value)) for key, value in facts.items() if key != 'model']
    width = max(len(name) for name, _ in rows)
    return '\n'.join(
        f'{"" if i else name:<{width}}  {printable(line)}' for name, lines in rows for i, line in enumerate(lines))


def in_lines(value: Any) -> list[str]:
    """A fact in lines, of many the first `MAX_LINES`."""
    if isinstance(value, dict):
        lines = [f'{key}: {in_words(each)}' for key, each in value.items()]
    else:
        values = value if isinstance(value, list) else [value]
        lines = [in_words(each) for each in values if each not in (None, '')]
    more = len(lines) - MAX_LINES
    return lines if more <= 0 else [*lines[:MAX_LINES], f'and {more:,} more']


def in_words(value: Any) -> str:
    """A value, or a model with the arguments that it needs, or with why it does not fit."""
    if not isinstance(value, dict):
        return f'{value:,}' if type(value) is int else str(value)
    name, args = value['name'], ', '.join(f'{key}={each}' for key, each in value['args'].items())
    if not value['fits']:
        return f'{name} does not fit: {value["problem"]}'
    return f'{name} with {args}' if args else name


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

"""`timm-itpn recipe`: print the authors' settings: of fine-tuning, for timm's `train.py -c`; of two other tasks; and of
pre-training, for `timm-itpn pretrain -c`."""
import argparse
from typing import Any

from ..engine.arguments import RECIPES


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser('recipe', help="print the authors' settings as YAML")
    parser.add_argument('model', nargs='?', help='name of a model or a task; without it the names are listed')
    parser.set_defaults(run=run)


def names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob('*.yaml'))


def run(args: argparse.Namespace) -> None:
    if args.model is None:
        print('\n'.join(names()))
    elif args.model not in names():
        raise ValueError(f'there is no recipe for {args.model!r}; there are: {", ".join(names())}')
    else:
        print((RECIPES / f'{args.model}.yaml').read_text(encoding='utf-8'), end='')

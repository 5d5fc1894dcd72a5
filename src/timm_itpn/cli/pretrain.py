"""`timm-itpn pretrain`: pre-train backbone and pyramid together, on images without labels."""
import argparse
import json
from typing import Any

from ..pretrain.arguments import add_arguments


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser('pretrain', help='pre-train backbone and pyramid on images without labels')
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..pretrain.task import pretrain

    result = pretrain(args)
    if result:  # only the first process has one
        print(json.dumps(result))

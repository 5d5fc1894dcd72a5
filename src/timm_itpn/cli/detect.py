"""`timm-itpn detect`: train and measure Mask R-CNN on data in COCO's format."""
import argparse
import json
from typing import Any

from ..detection.arguments import add_arguments


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser('detect', help='train and measure Mask R-CNN on data in the format of COCO')
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..detection.task import detect

    result = detect(args)
    if args.rank == 0:
        print(json.dumps(result))

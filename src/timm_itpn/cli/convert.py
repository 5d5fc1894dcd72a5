"""`timm-itpn convert`: an official checkpoint to a folder for timm and the Hugging Face Hub, and back."""
import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..checks import printable
from .arguments import PREFIX_HELP, ROLE_HELP, height_width, sizes_of_roles

DTYPES = ('float32', 'float16', 'bfloat16')


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser('convert', help="write timm's Hub folder from a checkpoint, or the reverse")
    parser.add_argument(
        'checkpoint', type=Path, metavar='FILE', help='checkpoint in official or native layout, or a converted folder')
    parser.add_argument(
        '-o', '--output', type=Path, metavar='DIR', required=True,
        help='new folder to write; with --reverse a new file')
    parser.add_argument(
        '--model', metavar='NAME',
        help='ARCH.TAG if it is the published file of that name, ARCH for weights of your own, both with or without '
             '_fpn (default: told from the file)')
    parser.add_argument('--dtype', choices=DTYPES, help="type of the written weights (default: the file's)")
    parser.add_argument('--ema', action='store_true', help='take the averaged weights (model_ema, state_dict_ema)')
    parser.add_argument('--prefix', metavar='PREFIX', help=PREFIX_HELP)
    parser.add_argument('--role', action='append', default=[], metavar='NAME=SIZE', help=ROLE_HELP)
    parser.add_argument(
        '--img-size', type=int, nargs='+', metavar=('H', 'W'),
        help='height and width, or the side of a square, that a position embedding is for (default: a square)')
    group = parser.add_argument_group(
        'images', "how the model takes images (default: what the checkpoint says, then the model's own)")
    group.add_argument('--crop-pct', type=float, metavar='SHARE', help='side of the crop, as a share of the image')
    group.add_argument('--mean', type=float, nargs='+', metavar='X', help='mean of the pixels, of each channel')
    group.add_argument('--std', type=float, nargs='+', metavar='X', help='their standard deviation')
    group.add_argument('--interpolation', metavar='NAME', help='bicubic, bilinear, ...')
    group.add_argument('--crop-mode', metavar='NAME', help='center, squash or border')
    group.add_argument('--class-map', type=Path, metavar='FILE.txt', help='names of the classes, one per line')
    parser.add_argument(
        '--verify', action='store_true',
        help='read what was written again and compare every tensor, and of a folder the outputs for a fixed image')
    parser.add_argument(
        '--reverse', action='store_true', help='write the official layout, for code that is built on the official one')
    parser.add_argument('--json', action='store_true', help='print what was read and written as JSON')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import torch

    from ..tools.checkpoint_file import DATA
    from ..tools.convert import convert, revert

    only_forward = ('model', 'role', 'class_map', *DATA)
    of_folder = {key: value for key, value in vars(args).items() if key in only_forward and value}
    if args.reverse and of_folder:
        names = ', '.join(f'--{key.replace("_", "-")}' for key in of_folder)
        raise ValueError(f'{names} has no meaning with --reverse: leave it out')
    options: dict[str, Any] = dict(
        dtype=getattr(torch, args.dtype) if args.dtype else None, ema=args.ema, img_size=height_width(args.img_size),
        verify=args.verify, prefix=args.prefix)
    if args.reverse:
        report = revert(args.checkpoint, args.output, **options)
    else:
        data = {key: value for key, value in vars(args).items() if key in DATA and value is not None}
        options.update(data=data, class_map=args.class_map, roles=sizes_of_roles(args.role))
        report = convert(args.checkpoint, args.output, args.model, **options)
    print(json.dumps(report, indent=2) if args.json else report['output'])
    if not args.json:
        print(summary(report), file=sys.stderr)


def summary(report: dict[str, Any]) -> str:
    source = report['source']
    lines = [f'{source["file"]}: {source["layout"]} layout, SHA-256 {source["sha256"]}']
    if source['wrapper']:
        lines.append(f'taken from {source["wrapper"]}' + (
            f', not from {" and ".join(source["others"])}' if source['others'] else ''))
    lines.append(f'parts: {", ".join(f"{part} {number:,}" for part, number in report["parts"].items())}')
    if report.get('guessed'):
        lines.append(f'taken for {report["model"]} by its contents; name another with --model')
    for where, values in report.get('settings', {}).items():
        if values:
            lines.append(f'from {where}: {", ".join(f"{key} {value}" for key, value in values.items())}')
    if report.get('class_map'):
        lines.append(f'names of the classes are in {report["class_map"]}: add them with --class-map')
    if report.get('trained_from'):
        lines.append(f'its args name {report["trained_from"]}, whose config is not in the checkpoint: compare the two')
    lines.append('verified' if report['verified'] else 'not verified: do that with --verify')
    return '\n'.join(map(printable, lines))  # there are names from the file in it

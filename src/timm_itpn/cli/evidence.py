"""`timm-itpn evidence`: run an experiment; what acceleration costs in accuracy, what pre-training gives."""
import argparse
import sys
from pathlib import Path
from typing import Any

from ..checks import check_device, check_figure, check_output, require
from ..engine.arguments import number
from ..files import save_figure
from ..studies import STUDIES


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser('evidence', help='measure what acceleration costs, and pre-training gives')
    parser.add_argument('study', nargs='?', choices=tuple(STUDIES), help='the experiment')
    parser.add_argument(
        '--seeds', type=number(0, 2 ** 32 - 1, int), nargs='+', default=[0, 1, 2], metavar='N', help='(default: 0 1 2)')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='(default: cpu)')
    parser.add_argument(
        '--record', type=Path, metavar='FILE.jsonl', help='file for the rows; seeds that it has are not measured again')
    parser.add_argument(
        '--measured', action='store_true', help='measure nothing, print the tables that come with the package')
    parser.add_argument(
        '--plot', type=Path, metavar='FILE.png', help='with --measured: draw speed against accuracy too')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.plot:
        if not args.measured:
            raise ValueError('--plot draws what comes with the package: use it with --measured')
        check_figure(args.plot, '--plot')

    from ..bench.rows import read, write
    from ..studies import results

    if args.measured:
        measured = {name: results.measured(name) for name in ([args.study] if args.study else STUDIES)}
        tables = [f'## {name}\n\n{results.markdown(name, rows)}' for name, rows in measured.items() if rows]
        print('\n\n'.join(['# Measured accuracy', 'Written by `timm-itpn evidence --measured`.', *tables]))
        if args.plot:
            save_figure(results.draw(), args.plot)
            print(args.plot, file=sys.stderr)
        return
    if args.study is None:
        raise ValueError(f'name an experiment, one of: {", ".join(STUDIES)}')
    require('the experiment', *STUDIES[args.study])
    check_device(args.device)
    if args.record:
        check_output(args.record)

    rows = read(args.record, results.Row) if args.record else []
    for row in results.run(args.study, args.seeds, {row.seed for row in rows}, args.device):
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
        if args.record:
            write(args.record, rows)
    print(results.markdown(args.study, rows))

"""`timm-itpn evidence`: run an experiment on digits; what acceleration costs in accuracy, what pre-training gives."""
import argparse
from pathlib import Path

from .. import studies
from ..checks import check_output, require


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    parser = subparsers.add_parser('evidence', help='measure what acceleration costs, and pre-training gives')
    parser.add_argument('study', nargs='?', choices=studies.NAMES, help='the experiment')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], metavar='N', help='(default: 0 1 2)')
    parser.add_argument('--record', type=Path, metavar='FILE.jsonl', help='new file for the rows, as JSON lines')
    parser.add_argument(
        '--measured', action='store_true', help='measure nothing, print the tables that come with the package')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..files import replaced
    from ..studies import results

    if args.measured:
        names = [args.study] if args.study else studies.NAMES
        measured = {name: rows for name in names if (rows := results.measured(name))}
        tables = [f'## {name}\n\n{results.markdown(name, rows)}' for name, rows in measured.items()]
        print('\n\n'.join(['# Measured accuracy', 'Written by `timm-itpn evidence --measured`.', *tables]))
        return
    if args.study is None:
        raise ValueError(f'name an experiment, one of: {", ".join(studies.NAMES)}')
    require('the experiment', 'demo', 'sklearn')
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise ValueError(f'--seeds {args.seeds}: give different numbers from 0 on')
    if args.record:
        check_output(args.record, '--record')

    rows = list(results.load(args.study).study(args.seeds))
    if args.record:
        with replaced(args.record) as part:
            part.write_text(''.join(row.json_line() for row in rows), encoding='utf-8')
    print(results.markdown(args.study, rows))

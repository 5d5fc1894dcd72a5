"""`timm-itpn evidence`: run an experiment; what acceleration costs in accuracy, what pre-training gives."""
import argparse
import sys
from pathlib import Path

from .. import studies
from ..checks import check_device, check_output, require


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    parser = subparsers.add_parser('evidence', help='measure what acceleration costs, and pre-training gives')
    parser.add_argument('study', nargs='?', choices=studies.NAMES, help='the experiment')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], metavar='N', help='(default: 0 1 2)')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='(default: cpu)')
    parser.add_argument(
        '--record', type=Path, metavar='FILE.jsonl', help='file for the rows; seeds that it has are not measured again')
    parser.add_argument(
        '--measured', action='store_true', help='measure nothing, print the tables that come with the package')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..bench.rows import json_line, read
    from ..files import replaced
    from ..studies import results

    if args.measured:
        measured = {name: results.measured(name) for name in ([args.study] if args.study else studies.NAMES)}
        tables = [f'## {name}\n\n{results.markdown(name, rows)}' for name, rows in measured.items() if rows]
        print('\n\n'.join(['# Measured accuracy', 'Written by `timm-itpn evidence --measured`.', *tables]))
        return
    if args.study is None:
        raise ValueError(f'name an experiment, one of: {", ".join(studies.NAMES)}')
    require('the experiment', 'demo', 'sklearn')
    if len(set(args.seeds)) < len(args.seeds) or not 0 <= min(args.seeds) <= max(args.seeds) < 2 ** 32:
        raise ValueError(f'--seeds {args.seeds}: give different numbers from 0 to {2 ** 32 - 1}')
    check_device(args.device)
    if args.record:
        check_output(args.record, '--record', overwrite=True)

    rows = read(args.record, results.Row.of_json) if args.record and args.record.exists() else []
    for row in results.load(args.study).study(args.seeds, {row.seed for row in rows}, args.device):
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
        if args.record:
            with replaced(args.record) as part:
                part.write_text(''.join(map(json_line, rows)), encoding='utf-8')
    print(results.markdown(args.study, rows))

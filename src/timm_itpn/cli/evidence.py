"""`timm-itpn evidence`: run an experiment on digits; what acceleration costs in accuracy, what pre-training gives."""
import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

REQUIRES = ('sklearn',)
STUDIES = ('acceleration', 'pretraining')


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser('evidence', help='measure what acceleration costs, and pre-training gives')
    parser.add_argument('study', choices=STUDIES, help='the experiment, on digits')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], metavar='N', help='(default: 0 1 2)')
    parser.add_argument('--record', type=Path, metavar='FILE.jsonl', help='new file for the rows, as JSON lines')
    parser.add_argument(
        '--measured', action='store_true', help='measure nothing, print the table that comes with the package')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..studies import evidence

    if args.measured:
        print(evidence.markdown(args.study, evidence.committed(args.study)))
        return
    missing = [name for name in REQUIRES if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"the experiment needs {', '.join(missing)}: pip install 'timm-itpn[demo]'")
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise ValueError(f'--seeds {args.seeds}: give different numbers from 0 on')
    if args.record:
        if args.record.exists():
            raise ValueError(f'{args.record} exists already: name another file with --record, or remove it')
        if not args.record.parent.is_dir():
            raise ValueError(f'{args.record} cannot be written: there is no folder {args.record.parent}')

    from ..bench.machine import facts
    from ..files import replaced

    rows = [{**row, **facts('cpu')} for row in evidence.STUDIES[args.study].study(args.seeds)]
    if args.record:
        with replaced(args.record) as part:
            part.write_text(''.join(f'{json.dumps(row)}\n' for row in rows))
    print(evidence.markdown(args.study, rows))

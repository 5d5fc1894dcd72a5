"""`timm-itpn bench`: measure a model beside others, and against what the machine can do."""
import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# these import no torch
from ..bench.cases import ACCELERATIONS, COMPILE_MODES, DTYPES, MODES, PEERS, Case, Rivals, Rounds, parse_size
from ..bench.rows import HEADER, cells, heading, markdown_table, measured, read, record, setting
from ..pretrain.arguments import OBJECTIVE_NAMES
from .table import columns

SUITE_NAMES = ('cpu', 'gpu')
DEVICES = ('cpu', 'cuda')
BATCH, LATENCY_BATCH = 8, 1

Work = list[tuple[Case, Rivals, Rounds]]


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser('bench', help='measure speed and memory of a model beside others')
    add_cases(parser.add_argument_group('cases', 'every combination of size, batch, dtype and mode is a case'))
    add_rivals(parser.add_argument_group('rivals', 'measured in turn with the model, which always takes part'))
    how = parser.add_argument_group('how')
    how.add_argument('--device', choices=DEVICES, help='(default: cpu)')
    how.add_argument('--repeats', type=int, metavar='N', help='rounds that count (default: by mode and device)')
    how.add_argument('--warmup', type=int, metavar='N', help='rounds before them (default: by device)')
    how.add_argument('--threads', type=int, metavar='N', help='CPU threads (default: as PyTorch has it)')
    how.add_argument(
        '--suite', choices=SUITE_NAMES,
        help='a fixed list of cases and rivals, in place of all the options above, each in a process of its own')
    out = parser.add_argument_group('output')
    out.add_argument('--json', action='store_true', help='print JSON lines, one for each case and contestant')
    out.add_argument('--plot', type=Path, metavar='FILE.png', help='draw a chart too')
    out.add_argument(
        '--record', type=Path, metavar='FILE.jsonl',
        help='add the rows to a file too, in place of older ones of the same case, contestant and machine')
    out.add_argument(
        '--measured', action='store_true', help='measure nothing, print the rows that come with the package')
    parser.set_defaults(run=run)


def add_cases(group: Any) -> None:
    group.add_argument('--model', metavar='NAME', help='any model of this package (default: fast_itpn_base)')
    group.add_argument(
        '--size', nargs='+', metavar='N', help='side of the images, or HEIGHTxWIDTH such as 800x1344 (default: 224)')
    group.add_argument(
        '--batch', type=int, nargs='+', metavar='N',
        help=f'images per call (default: {BATCH}, in the mode latency {LATENCY_BATCH})')
    group.add_argument('--dtype', nargs='+', choices=tuple(DTYPES), help='(default: float32)')
    group.add_argument(
        '--mode', nargs='+', choices=MODES,
        help='forward; train = forward, loss (cross-entropy, with --pyramid the sum of the mean squares of the levels) '
             'and backward, without optimizer; latency = one call at a time, waiting for its end (default: forward)')
    group.add_argument(
        '--grad-checkpointing', action='store_true', help='recompute activations in the backward pass; for train')
    group.add_argument(
        '--pyramid', action='store_true',
        help='backbone and feature pyramid (strides 4 to 64) instead of backbone and classifier')


def add_rivals(group: Any) -> None:
    group.add_argument('--baseline', action='store_true', help='the same Fast-iTPN computed the unfused way')
    group.add_argument('--fuse', action='store_true', help='the model after timm_itpn.fuse(); not for train')
    group.add_argument(
        '--acceleration', nargs='+', choices=ACCELERATIONS,
        help='the model with token gathering and migration, and the same weights; other outputs by design')
    group.add_argument(
        '--objective', choices=OBJECTIVE_NAMES,
        help='a step of pre-training with this objective, without its teacher; for --mode train --pyramid')
    group.add_argument(
        '--compile', nargs='?', const='default', choices=COMPILE_MODES, metavar='MODE',
        help=f'the model under torch.compile, in one of the modes {", ".join(COMPILE_MODES)}')
    group.add_argument(
        '--peers', nargs='*', metavar='NAME', help=f'models of timm (without names: {", ".join(PEERS)})')
    group.add_argument(
        '--against', metavar='FILE:FUNCTION',
        help='a module that a function of a Python file returns; of the arguments img_size=(height, width) and '
             'num_classes= it gets those that it takes; with --pyramid its outputs are a list of maps')


def run(args: argparse.Namespace) -> None:
    if args.measured:
        print(markdown_table(measured()))
        return
    check_outputs(args)
    work, device = suite(args) if args.suite else (list(asked_for(args)), args.device or 'cpu')
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler, which counts memory, prints to stderr

    import torch

    from ..bench.cases import check
    from ..bench.measure import TOLERANCES, measure, measure_alone

    for case, rivals, rounds in work:
        check(case, rivals, rounds, device)
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f'{args.threads} threads are not usable: ask for at least 1')
        torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for case, rivals, rounds in work:
        rows_of_case = (measure_alone if args.suite else measure)(case, rivals, rounds, device)
        rows += rows_of_case
        show(rows_of_case, args.json)
        if args.record:
            record(args.record, rows_of_case)
    if not args.json:
        print(setting(rows[0]))
    if args.plot:
        from ..bench.chart import draw, save
        save(draw(rows), args.plot)
        print(args.plot, file=sys.stderr if args.json else sys.stdout)
    wrong = [f'{row["contestant"]} by {row["output_error"]:.2g}' for row in rows if row['ratio'] is None]
    if wrong:
        raise RuntimeError(f'outputs differ from ours, so there is no ratio: {", ".join(wrong)}; see {TOLERANCES}')


def check_outputs(args: argparse.Namespace) -> None:
    """Raise now for what would fail only after everything is measured."""
    if args.plot:
        from ..bench.chart import check_output
        check_output(args.plot)
    if args.record:
        if not args.record.parent.is_dir():
            raise ValueError(f'{args.record} cannot be written: there is no folder {args.record.parent}')
        read(args.record)


def suite(args: argparse.Namespace) -> tuple[Work, str]:
    """Cases and device of --suite."""
    from ..bench.suites import SUITES

    fixed = (
        'model', 'size', 'batch', 'dtype', 'mode', 'grad_checkpointing', 'baseline', 'fuse', 'compile', 'peers',
        'against', 'pyramid', 'acceleration', 'objective', 'repeats', 'warmup', 'device')
    given = [f'--{name.replace("_", "-")}' for name in fixed if getattr(args, name) not in (None, False)]
    if given:
        raise ValueError(f'a suite is fixed: leave out {", ".join(given)}')
    return SUITES[args.suite], 'cuda' if args.suite == 'gpu' else 'cpu'


def asked_for(args: argparse.Namespace) -> Iterator[tuple[Case, Rivals, Rounds]]:
    """The cases of a command line without --suite."""
    rivals = Rivals(
        baseline=args.baseline,
        fuse=args.fuse,
        compile=args.compile or '',
        peers=() if args.peers is None else tuple(args.peers) or PEERS,
        against=args.against or '',
        accelerations=tuple(args.acceleration or ()),
        objective=args.objective or '',
    )
    for name, value in (('repeats', args.repeats), ('warmup', args.warmup)):
        if value == 0:
            raise ValueError(f'--{name} 0 is not usable')
    rounds = Rounds(args.repeats or 0, args.warmup or 0)
    sizes = [parse_size(text) for text in args.size or ['224']]
    for mode, size, dtype in itertools.product(args.mode or ['forward'], sizes, args.dtype or ['float32']):
        for batch in args.batch or [LATENCY_BATCH if mode == 'latency' else BATCH]:
            model = args.model or 'fast_itpn_base'
            case = Case(model, size, batch, dtype, mode, args.grad_checkpointing, args.pyramid)
            yield case, rivals, rounds


def show(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Print the rows of a case."""
    if as_json:
        print('\n'.join(json.dumps(row) for row in rows), flush=True)
        return
    print(heading(rows[0]))
    texts = [HEADER, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*texts)]
    left = (0, len(HEADER) - 1)  # names; the rest are numbers
    aligned = [
        [text if i in left else text.rjust(width) for i, (text, width) in enumerate(zip(line, widths))]
        for line in texts]
    print(columns(aligned[0], aligned[1:]), end='\n\n', flush=True)

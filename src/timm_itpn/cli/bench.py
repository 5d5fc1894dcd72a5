"""`timm-itpn bench`: measure a model beside others, and against what the machine can do."""
import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import bench

# these import no torch
from ..bench.cases import COMPILE_MODES, DTYPES, MODES, PEERS, Asked, Case, check, parse_size
from ..bench.rows import SPEEDUPS, Row, draw, json_line, markdown, markdown_of_case, measured, read, record
from ..checks import check_device, check_figure, check_output
from ..engine.arguments import number, positive
from ..files import save_figure
from ..pretrain import OBJECTIVE_NAMES

SUITES = Path(bench.__file__).with_name('suites')  # a line is what is given to `timm-itpn bench`
_OF_CASES = ('size', *(field.name for cls in (Case, Asked) for field in fields(cls)))  # options


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        'bench', help='measure speed and memory of a model beside others', parents=[_parser_of_cases()])
    group = parser.add_argument_group('all cases')
    group.add_argument(
        '--suite', choices=sorted(path.stem for path in SUITES.glob('*.txt')),
        help='a fixed list of cases, in place of all options above')
    group.add_argument(
        '--threads', type=number(1, os.cpu_count() or 1, int), metavar='N', help="CPU threads (default: PyTorch's)")

    group = parser.add_argument_group('output')
    group.add_argument('--json', action='store_true', help='print JSON lines, one for each case and candidate')
    group.add_argument('--plot', type=Path, metavar='FILE.png', help='draw a chart too')
    group.add_argument(
        '--record', type=Path, metavar='FILE.jsonl',
        help='add the rows to a file too, in place of older ones of the same case, candidate and processor')
    group.add_argument(
        '--measured', action='store_true', help='measure nothing, print the rows that come with the package')
    parser.set_defaults(run=run)


def _parser_of_cases() -> argparse.ArgumentParser:
    """Parser of a line of a suite; it tells only what is given, defaults are those of `Case` and `Asked`."""
    parser = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    group = parser.add_argument_group('cases', 'every combination of size, batch, dtype and mode is a case')
    group.add_argument('--model', metavar='NAME', help='any model of this package (default: fast_itpn_base)')
    group.add_argument(
        '--size', nargs='+', metavar='N', help='side of the images, or HEIGHTxWIDTH such as 800x1344 (default: 224)')
    group.add_argument(
        '--batch', type=positive, nargs='+', metavar='N', help='images per call (default: 8, in the mode latency 1)')
    group.add_argument('--dtype', nargs='+', choices=DTYPES, help='(default: float32)')
    group.add_argument(
        '--mode', nargs='+', choices=MODES,
        help='forward; train = forward, loss (cross-entropy, with --pyramid the sum of the mean squares of the levels) '
             'and backward, without optimizer; latency = forward, with its 95th percentile (default: forward)')
    group.add_argument(
        '--pyramid', action='store_true',
        help='backbone and feature pyramid (strides 4 to 64) instead of backbone and classifier')
    group.add_argument(
        '--templates', type=positive, metavar='N',
        help="images of half the side that are encoded with each, as trackers do; outputs are the large one's map")

    group = parser.add_argument_group('candidates', 'measured in turn with the model, which always takes part')
    group.add_argument('--baseline', action='store_true', help='the same Fast-iTPN computed the unfused way')
    group.add_argument('--fuse', action='store_true', help='the model after timm_itpn.fuse(); not for train')
    group.add_argument(
        '--acceleration', nargs='+', metavar='NAME',
        help='the model with token gathering and migration (light, full) and the same weights; other outputs by design')
    group.add_argument(
        '--objective', choices=OBJECTIVE_NAMES,
        help='a step of pre-training with this objective, without its teacher; for --mode train --pyramid')
    group.add_argument(
        '--compile', nargs='?', const='default', choices=COMPILE_MODES, metavar='MODE',
        help=f'the model under torch.compile, in one of the modes {", ".join(COMPILE_MODES)}')
    group.add_argument('--onnx', action='store_true', help='the model in ONNX Runtime; on the CPU in float32')
    group.add_argument(
        '--peers', nargs='*', metavar='NAME', help=f'models of timm (without names: {", ".join(PEERS)})')
    group.add_argument(
        '--against', metavar='FILE:FUNCTION',
        help='the module that a function of a Python file returns; it is called with img_size=(height, width) and '
             'num_classes=; with --pyramid the outputs are a list of maps')

    group = parser.add_argument_group('how')
    group.add_argument('--device', choices=('cpu', 'cuda'), help='(default: cpu)')
    group.add_argument(
        '--repeats', type=number(3, kind=int), metavar='N', help='rounds that count (default: by mode and device)')
    group.add_argument('--warmup', type=positive, metavar='N', help='rounds before them (default: by device)')
    return parser


def run(args: argparse.Namespace) -> None:
    if args.measured:
        print(f'# Measured speed\n\nWritten by `timm-itpn bench --measured`.\n\n{markdown(measured())}')
        return
    if args.plot:  # now, not when everything is measured
        check_figure(args.plot, '--plot')
    if args.record:
        check_output(args.record)
        read(args.record, Row)  # ValueError if it holds something else
    given = {name: value for name, value in vars(args).items() if name in _OF_CASES}
    work = list(_suite(args.suite, given) if args.suite else _asked_for(given))
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler, which counts memory, prints to stderr

    import torch

    from ..bench.measure import TOLERANCES, measure, measure_alone

    for case, asked in work:
        check(case, asked)
        check_device(asked.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows: list[Row] = []
    for case, asked in work:
        of_case = (measure_alone if len(work) > 1 else measure)(case, asked)
        rows += of_case
        text = ''.join(map(json_line, of_case)) if args.json else f'{markdown_of_case(of_case)}\n\n'
        print(text, end='', flush=True)
        if args.record:
            record(args.record, of_case)
    if not args.json:
        print(f'{SPEEDUPS}\n{rows[0].machine}')
    if args.plot:
        save_figure(draw(rows), args.plot)
        print(args.plot, file=sys.stderr if args.json else sys.stdout)
    wrong = [f'{row.candidate} by {row.output_error:.2g}' for row in rows if row.speedup_over_ours is None]
    if wrong:
        raise RuntimeError(f'outputs differ from ours: {", ".join(wrong)}; allowed are {TOLERANCES}')


def _suite(name: str, given: dict[str, Any]) -> Iterator[tuple[Case, Asked]]:
    """The cases of --suite."""
    if given:
        raise ValueError(f'a suite is fixed: leave out {", ".join(f"--{option}" for option in given)}')
    for line in (SUITES / f'{name}.txt').read_text().splitlines():
        yield from _asked_for(vars(_parser_of_cases().parse_args(line.split())))


def _asked_for(given: dict[str, Any]) -> Iterator[tuple[Case, Asked]]:
    """The cases of options that are given, and what is asked with each."""
    given = {'size': ['224'], 'dtype': [Case.dtype], 'mode': [Case.mode], **given}
    if given.get('peers') == []:  # without names
        given['peers'] = PEERS
    asked = Asked(**{field.name: given[field.name] for field in fields(Asked) if field.name in given})
    shared = {name: given[name] for name in ('model', 'pyramid', 'templates') if name in given}
    for mode, size, dtype in itertools.product(given['mode'], given['size'], given['dtype']):
        for batch in given.get('batch', [1 if mode == 'latency' else Case.batch]):
            yield Case(img_size=parse_size(size), batch=batch, dtype=dtype, mode=mode, **shared), asked

"""Command line of pre-training; like all else that is imported before a command runs, without torch."""
import argparse
from pathlib import Path

from ..engine.arguments import PAIRS, add_common_arguments, number, positive
from . import OBJECTIVE_NAMES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all arguments."""
    group = parser.add_argument_group('data')
    group.add_argument('--data-dir', type=Path, metavar='DIR', help='folder or tar file of images')
    group.add_argument('--dataset', default='', metavar='NAME', help="timm's name: hfds/..., wds/..., '' for a folder")
    group.add_argument('--train-split', default='train', metavar='NAME', help='split of the data set')
    group.add_argument('--train-num-samples', type=positive, metavar='N', help='number of images, for streams (wds)')
    group.add_argument('--img-size', type=positive, default=224, metavar='N', help="side of student's images, pixels")
    group.add_argument('--scale', type=number(0, 1), nargs=2, default=[0.2, 1.0], help='crop, share of the area')
    group.add_argument('--ratio', type=number(0), nargs=2, default=[3 / 4, 4 / 3], help='crop, width by height')
    group.add_argument('--hflip', type=number(0, 1), default=0.5, help='probability of a horizontal flip')
    group.add_argument('--train-interpolation', default='bicubic', help='interpolation of the crop')

    group = parser.add_argument_group('student, objective, teacher')
    group.add_argument('--model', default='fast_itpn_base', help='any model of this package')
    group.add_argument('--model-kwargs', help="the model's arguments", **PAIRS)
    group.add_argument('--objective', choices=OBJECTIVE_NAMES,
                       help='what is learned; default: clip with --teacher, pixel without')
    group.add_argument('--objective-kwargs', help="the objective's arguments", **PAIRS)
    group.add_argument('--masking', choices=('block', 'random'), help="what is masked; default: the objective's")
    group.add_argument('--mask-ratio', type=number(0, 1), help="share of masked tokens; default: the objective's")
    group.add_argument('--teacher', metavar='NAME', help="timm's name of the teacher")
    group.add_argument('--teacher-path', metavar='FILE', help='its weights; default: the published ones')
    group.add_argument('--teacher-img-size', type=positive, metavar='N', help="default: what gives the student's grid")
    group.add_argument('--drop-path', type=number(0, 1), default=0.1, help='stochastic depth rate of the last block')
    add_common_arguments(
        parser, output=Path('output/pretrain'), batch_size=128, epochs=1600, min_lr=1e-5, clip_grad=3.)
    group = parser.add_argument_group('learning rate without --lr')
    group.add_argument('--lr-base', type=number(0), default=1.875e-4, help='learning rate for --lr-base-size images')
    group.add_argument('--lr-base-size', type=positive, default=256, help='images per update that --lr-base is for')

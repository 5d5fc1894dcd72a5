"""Command line of detection; like all else that is imported before a command runs, without torch."""
import argparse
from pathlib import Path

from ..engine.arguments import PAIRS, add_common_arguments, number, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all arguments."""
    group = parser.add_argument_group('data')
    group.add_argument('--data-dir', type=Path, metavar='DIR', help='folder in the layout of COCO')
    group.add_argument('--train-split', metavar='NAME', help='default: train2017 or train')
    group.add_argument('--val-split', metavar='NAME', help='default: val2017 or val')
    sides = "authors', in proportion to the images"
    group.add_argument('--short-sides', type=positive, nargs='+', metavar='N', help=f'of images; default: {sides}')
    group.add_argument('--max-side', type=positive, metavar='N', help=f'largest long side; default: {sides}')
    group.add_argument('--crop-short-sides', type=positive, nargs='+', metavar='N',
                       help='of the half of the images that are cropped before')
    group.add_argument('--crop-sides', type=positive, nargs=2, metavar='N', help='smallest and largest side of a crop')
    group.add_argument('--hflip', type=number(0, 1), default=0.5, help='probability of a horizontal flip')

    group = parser.add_argument_group('detector')
    group.add_argument('--model', default='fast_itpn_tiny_fpn', help='any model with pyramid')
    group.add_argument('--model-kwargs', help="the model's arguments", **PAIRS)
    group.add_argument('--pretrained', action='store_true', help='start from the published weights')
    group.add_argument('--pretrained-path', metavar='FILE', help='start from these, such as those of pretrain')
    group.add_argument('--initial-checkpoint', metavar='FILE', help='start from a detector: heads and all')
    group.add_argument('--drop-path', type=number(0, 1), default=0.05, help='stochastic depth rate of the last block')
    group.add_argument('--head-dim', type=positive, default=128, metavar='N', help='channels of both heads')
    group.add_argument('--head-norm', default='batch', choices=('batch', 'group'), help='norm of the box head')
    group.add_argument('--box-samples', type=positive, default=128, metavar='N', help='boxes per image for both heads')
    group.add_argument('--num-proposals', type=positive, default=300, metavar='N', help='boxes to sample from')
    group.add_argument('--detector-kwargs', help="arguments of torchvision's MaskRCNN", **PAIRS)

    group = parser.add_argument_group('evaluation')
    group.add_argument('--evaluate', type=Path, metavar='CHECKPOINT', help='measure a checkpoint, and no more')
    group.add_argument('--eval-interval', type=positive, default=1, metavar='N', help='epochs between evaluations')

    add_common_arguments(
        parser, output=Path('output/detect'), batch_size=2, epochs=12, lr=1e-4, min_lr=1e-6, clip_grad=1.,
        figure_interval=1)
    group = parser.add_argument_group('optimization of detectors')
    group.add_argument('--layer-decay', type=number(0, 1), metavar='X',
                       help='learning rate of a layer by that of the next; default: 0.9 for weights of a file, else 1')
    group.add_argument('--decay-milestones', type=positive, nargs='+', default=[9, 11],
                       help='epochs, for --sched multistep')
    group.add_argument('--decay-rate', type=number(0, 1), default=0.1, help='at these')

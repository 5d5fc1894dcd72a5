"""Options of every kind of training, and the parser of commands, whose --config names a YAML file of defaults.

Names are those of timm's `train.py`. Nothing here imports torch, so that `--help` is quick.
"""
import argparse
import ast
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..checks import printable, read_text

MAX_WORKERS = 512
RECIPES = Path(__file__).parents[1] / 'recipes'

# may differ when a run is resumed: they do not change what is computed
FREE = ('run', 'config', 'resume', 'output', 'workers', 'log_interval', 'checkpoint_hist', 'recovery_interval',
        'figure_interval', 'log_tensorboard', 'data_dir', 'changed_data', 'device', 'rank', 'local_rank', 'distributed')
# may, too, and the run says so
CHANGEABLE = ('lr', 'min_lr', 'warmup_lr', 'clip_grad', 'amp', 'amp_dtype',
              'grad_checkpointing', 'torchcompile', 'deterministic', 'fsdp')


def add_common_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add what is the same for every kind of training; `defaults` are those of one kind."""
    parser.add_argument('-c', '--config', type=Path, metavar='FILE.yaml',
                        help='defaults for all other arguments: a file, or the name of a recipe')

    group = parser.add_argument_group('optimization')
    group.add_argument('-b', '--batch-size', type=positive, metavar='N', help='of a process, per step')
    group.add_argument('--grad-accum-steps', type=positive, default=1, metavar='N', help='steps per update')
    group.add_argument('--opt', default='adamw', help="timm's name of the optimizer")
    group.add_argument('--opt-eps', type=number(0), help="epsilon, default: the optimizer's")
    group.add_argument('--opt-betas', type=number(0, 1), nargs='+', help="betas, default: the optimizer's")
    group.add_argument('--weight-decay', type=number(0), default=0.05)
    group.add_argument('--clip-grad', type=number(0), metavar='NORM', help='largest norm of gradients, 0: none')
    group.add_argument('--lr', type=number(0), help='peak learning rate')
    group.add_argument('--sched', default='cosine', help="timm's name of the schedule; steps are updates")
    group.add_argument('--epochs', type=positive)
    group.add_argument('--warmup-epochs', type=number(0, kind=int), help='default: a tenth of the epochs, at most 10')
    group.add_argument('--warmup-updates', type=number(0, kind=int), metavar='N', help='in place of --warmup-epochs')
    group.add_argument('--warmup-lr', type=number(0), default=0.)
    group.add_argument('--min-lr', type=number(0))
    group.add_argument('--model-ema', action='store_true', help='average the weights')
    group.add_argument('--model-ema-decay', type=number(0, 1), default=0.9999)

    group = parser.add_argument_group('device')
    group.add_argument('-j', '--workers', type=number(0, MAX_WORKERS, int), default=4, metavar='N',
                       help='processes that read, 0 for none')
    group.add_argument('--device', help='PyTorch device; default: cuda where there is one, else cpu')
    group.add_argument('--amp', action='store_true', help='autocast')
    group.add_argument('--amp-dtype', default='bfloat16', choices=('bfloat16', 'float16'))
    group.add_argument('--grad-checkpointing', action='store_true', help='recompute blocks in the backward pass')
    group.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='compile what is trained')
    group.add_argument('--fsdp', action='store_true', help='each process holds a share of the parameters (FSDP2)')
    group.add_argument('--seed', type=int, default=42, help='seed of weights, order, crops and masks')
    group.add_argument('--deterministic', action='store_true', help='deterministic algorithms only')

    group = parser.add_argument_group('output')
    group.add_argument('--output', type=Path, metavar='DIR', help='folder of the run')
    group.add_argument('--resume', metavar='auto|FILE', help='go on from the last checkpoint, or from FILE')
    group.add_argument('--changed-data', action='store_true', help='go on though the images are others than before')
    group.add_argument('--checkpoint-hist', type=positive, metavar='N',
                       help='checkpoints to keep; default: 2, at the end 1')
    group.add_argument('--recovery-interval', type=number(0, kind=int), default=0, metavar='N',
                       help='updates between checkpoints; 0: only after epochs')
    group.add_argument('--log-interval', type=positive, default=50, metavar='N', help='updates per line of the log')
    group.add_argument('--figure-interval', type=number(0, kind=int), default=0, metavar='N',
                       help='epochs between pictures, 0: none')
    group.add_argument('--log-tensorboard', action='store_true', help='also write for TensorBoard')
    parser.set_defaults(**defaults)


def number(low: float, high: float = math.inf, kind: Callable[[str], float] = float) -> Callable[[str], float]:
    """Parser of finite numbers from `low` to `high`."""
    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or math.isinf(value):  # NaN is not, either
            upper = '' if math.isinf(high) else f' to {high}'
            raise argparse.ArgumentTypeError(f'{text} is not usable: give a number from {low}{upper or " on"}')
        return value
    parse.__name__ = kind.__name__  # in argparse's messages
    return parse


positive = number(1, kind=int)


class _KeyValues(argparse.Action):
    """`KEY=VALUE` pairs as a dict; a YAML file has a mapping in their place."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        pairs: dict[str, Any] = {}
        for pair in values:
            key, equals, text = pair.partition('=')
            if not equals:
                parser.error(f'{option_string}: {pair!r} is not an argument: write KEY=VALUE')
            try:
                pairs[key] = ast.literal_eval(text)
            except (SyntaxError, ValueError):  # a plain word
                pairs[key] = text
        setattr(namespace, self.dest, pairs)


PAIRS: dict[str, Any] = dict(nargs='*', action=_KeyValues, default={}, metavar='KEY=VALUE')


class ConfigurableParser(argparse.ArgumentParser):
    """Parser whose --config, where it has one, names a YAML file of defaults, and whose errors are one line each."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: {printable(message)}; see {self.prog} --help\n')

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, rest = super().parse_known_args(args, namespace)
        if getattr(known, 'config', None) is None:
            return known, rest
        first = self._read_config(known.config, known)
        known, rest = super().parse_known_args([*first, *(sys.argv[1:] if args is None else args)], namespace)
        known.config = None  # else the parser of all commands reads it, too
        return known, rest

    def _read_config(self, path: Path, known: argparse.Namespace) -> list[str]:
        """Settings of a YAML file as on a command line; exits if it cannot be read, or has a name that is not known."""
        recipe = RECIPES / f'{path}.yaml'
        path = recipe if recipe.is_file() and not path.exists() else path
        try:
            settings = yaml.safe_load(read_text(path)) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.error(f'{path} cannot be read: {" ".join(str(error).split())}')
        if not isinstance(settings, dict):
            self.error(f'{path} does not hold settings: write one `name: value` per line')
        unknown = [str(key) for key in settings if key not in known]
        if unknown:
            self.error(f'{path} has settings that do not exist: {", ".join(unknown)}')
        options = []
        for key, value in settings.items():
            option = f'--{key.replace("_", "-")}'
            if isinstance(value, dict):
                options += [option, *(f'{name}={given!r}' for name, given in value.items())]
            elif isinstance(value, list):
                options += [option, *map(str, value)]
            elif value is not None and value is not False:
                options.append(option if value is True else f'{option}={value}')
            elif value != self.get_default(key):
                self.error(f'{path}: {key} cannot be {value}')
        return options

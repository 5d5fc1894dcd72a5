"""The console command `timm-itpn`; one file per command.

Results go to stdout, progress to stderr. Exit status: 0 done, 1 it could not be done, 2 the command line
cannot be read, 130 interrupted.
"""
import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from ..pretrain.arguments import ConfigurableParser
from . import bench, convert, demo, evidence, inspect, pretrain, recipe, show
from . import list as list_command  # list would hide Python's
from .table import printable

COMMANDS = (bench, convert, demo, evidence, inspect, list_command, pretrain, recipe, show)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: Arguments without the program's name, None for those of the process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog='timm-itpn', description='iTPN and Fast-iTPN models for timm.')
    parser.add_argument('--version', action='version', version=f'timm-itpn {__version__}')
    subparsers = parser.add_subparsers(metavar='COMMAND', required=True, parser_class=ConfigurableParser)
    for command in COMMANDS:
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (OSError, RuntimeError, ValueError) as error:
        print(f'timm-itpn: {printable(str(error))}', file=sys.stderr)  # it may name keys of a file
        return 1
    except KeyboardInterrupt:
        return 130
    return 0

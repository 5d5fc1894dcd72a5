"""The console command `timm-itpn`; one file per command.

Results go to stdout, progress to stderr. Exit status: 0 done, 1 it could not be done, 2 the command line cannot be
read, 130 interrupted, 141 nobody reads the output any more. Whatever goes wrong in a command becomes one line here.
"""
import contextlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..checks import printable
from ..engine.arguments import ConfigurableParser
from . import bench, convert, demo, detect, evidence, inspect, pretrain, recipe, show
from . import list as list_command  # list would hide Python's

COMMANDS = (bench, convert, demo, detect, evidence, inspect, list_command, pretrain, recipe, show)

_SAID = (AssertionError, ImportError, OSError, RuntimeError, ValueError)  # whose text is meant for people


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: Arguments without the program's name, None for those of the process.

    Returns:
        The exit status.
    """
    parser = ConfigurableParser(prog='timm-itpn', description='iTPN and Fast-iTPN models for timm.')
    parser.add_argument('--version', action='version', version=f'timm-itpn {__version__}')
    subparsers = parser.add_subparsers(metavar='COMMAND', required=True, parser_class=ConfigurableParser)
    for command in COMMANDS:
        command.add_parser(subparsers)
    with _output(), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'timm-itpn: its models')  # commands fail for the same reason, and say it
        try:
            args = parser.parse_args(argv)
            args.run(args)
            sys.stdout.flush()
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # such as that to `head`
            return 141
        except Exception as error:  # whatever a command raises is told in one line
            print(f'timm-itpn: {_sentence(error)}', file=sys.stderr)
            return 1
    return 0


def _sentence(error: Exception) -> str:
    """An error in one line; it may name keys of a file, so it is escaped."""
    text = str(error).strip()
    if '\nOriginal Traceback (' in text:  # of a process that reads
        text = text.splitlines()[-1].partition(': ')[2]
    text = ' '.join(text.split())
    if not isinstance(error, _SAID) or not text:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f'{Path(last.filename).name}, line {last.lineno}'
        text = f'{": ".join(filter(None, (type(error).__name__, text)))} (in {where})'
    return printable(text)


class _Stderr:
    """A stream for what a command tells meanwhile; where that cannot be written, it is lost, and the work goes on."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.stream, name)

        def called(*args: Any) -> Any:
            with contextlib.suppress(OSError):
                return found(*args)
        return called if name in ('write', 'flush') else found


@contextlib.contextmanager
def _output() -> Iterator[None]:
    """Have a stdout and a stderr also where a shell has closed them, and a stdout for every file name."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, 'w') for stream in (sys.stdout, sys.stderr))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='surrogateescape')
    stderr: Any = _Stderr(sys.stderr)
    try:
        with contextlib.redirect_stderr(stderr):
            yield
    finally:
        for stream in (sys.stdout, stderr.stream):
            try:
                stream.flush()
            except OSError:  # Python would complain at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

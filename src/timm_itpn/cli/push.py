"""`timm-itpn push`: publish a folder that `timm-itpn convert` wrote as a model repository of the Hugging Face Hub."""
import argparse
import contextlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import __version__

FILES = ('README.md', 'config.json', 'model.safetensors')  # timm's layout; nothing else goes up


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        'push', help='publish a converted model on the Hugging Face Hub',
        description='Publish a converted model on the Hugging Face Hub, with the token of `hf auth login` or HF_TOKEN. '
                    'Without --yes nothing is sent: it only says what would be.')
    parser.add_argument('dir', type=Path, metavar='DIR', help='folder that `timm-itpn convert` wrote')
    parser.add_argument('repo', metavar='REPO', help='OWNER/NAME on the Hub, made if there is none')
    parser.add_argument('--yes', action='store_true', help='really upload')
    parser.add_argument('--private', action='store_true', help='upload only to a repository that others cannot see')
    parser.add_argument(
        '--revision', default='main', metavar='BRANCH', help='made from main if there is none (default: %(default)s)')
    parser.add_argument('--message', metavar='TEXT', help='of the commit (default: names the model)')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    check_repo(args.repo)
    check_files(args.dir)
    check_weights(args.dir)
    architecture = read_architecture(args.dir)
    left = sorted(path.name for path in args.dir.iterdir() if path.name not in FILES)
    if left:
        print(f'left behind: {", ".join(left)}', file=sys.stderr)
    licence = read_licence(args.dir)
    if licence in ('', 'unknown'):
        print('the licence of the weights is unknown: publish them only if you have the right to', file=sys.stderr)
    print(describe(args), file=sys.stderr if args.yes else sys.stdout)
    if not args.yes:
        print(f'nothing was sent; upload it with: {real_command(args)}', file=sys.stderr)
        return
    url = upload(args, args.message or f'Upload {architecture} with timm-itpn {__version__}')
    source = args.repo if args.revision == 'main' else f'{args.repo}@{args.revision}'
    print(url)
    print(f"load it with: timm.create_model('hf-hub:{source}', pretrained=True)", file=sys.stderr)


def check_repo(repo: str) -> None:
    from huggingface_hub.utils import validate_repo_id

    example = 'name it like this: timm-itpn push DIR OWNER/NAME'
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', repo, re.ASCII):  # validate_repo_id needs no owner
        raise ValueError(f'{repo!r} is no owner and name of a repository: {example}')
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise ValueError(f'{repo!r} is no name of a repository ({error}): {example}') from error


def how_to_write(folder: Path) -> str:
    remove = 'remove it, and ' if folder.exists() else ''
    return f'{remove}write it with: timm-itpn convert FILE --model NAME -o {shlex.quote(str(folder))}'


def check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f'{folder} {"is no folder" if folder.exists() else "does not exist"}: {how_to_write(folder)}')
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f'{folder} has no {" and no ".join(missing)}: {how_to_write(folder)}')


def check_weights(folder: Path) -> None:
    from safetensors import SafetensorError, safe_open

    path = folder / 'model.safetensors'
    try:
        with safe_open(path, framework='np') as file:  # reads the header, and compares the size with it
            if not file.keys():
                raise ValueError(f'{path} holds no tensors: {how_to_write(folder)}')
    except SafetensorError as error:
        raise ValueError(f'{path} is truncated or no safetensors file ({error}): {how_to_write(folder)}') from error


def read_architecture(folder: Path) -> str:
    """Name of the model in config.json, which is one of this package."""
    from ..models.names import check_name  # its package registers them even where TIMM_ITPN_AUTOLOAD=0

    path = folder / 'config.json'
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is no JSON ({error}): {how_to_write(folder)}') from error
    architecture = config.get('architecture') if isinstance(config, dict) else None
    if not isinstance(architecture, str):
        raise ValueError(f'{path} names no architecture: {how_to_write(folder)}')
    try:
        check_name(architecture)
    except ValueError as error:
        raise ValueError(f'{path} names a model of others ({error}): {how_to_write(folder)}') from error
    return architecture


def read_licence(folder: Path) -> str:
    """What README.md's front matter says under `license`, '' if nothing."""
    path = folder / 'README.md'
    try:
        text = path.read_text(encoding='utf-8')
    except ValueError as error:
        raise ValueError(f'{path} is no text in UTF-8 ({error}): {how_to_write(folder)}') from error
    front = re.match(r'---\n(.*?\n)---\n', text, re.DOTALL)
    found = re.search(r'^license:[ \t]*(\S*)', front[1], re.MULTILINE) if front else None
    return found[1].strip('\'"') if found else ''


def describe(args: argparse.Namespace) -> str:
    """What goes where, as lines."""
    from ..weights.integrity import sha256_of

    sizes = {name: f'{(args.dir / name).stat().st_size:,} bytes' for name in FILES}
    sizes['model.safetensors'] += f', SHA-256 {sha256_of(args.dir / "model.safetensors")}'
    rows: dict[str, str] = {
        'repository': args.repo + (' (private)' if args.private else ''), 'revision': args.revision, **sizes}
    return '\n'.join(f'{key:<18} {value}' for key, value in rows.items())


def real_command(args: argparse.Namespace) -> str:
    options = ['--private'] if args.private else []
    if args.revision != 'main':
        options += ['--revision', args.revision]
    if args.message:
        options += ['--message', args.message]
    return shlex.join(['timm-itpn', 'push', str(args.dir), args.repo, *options, '--yes'])


def upload(args: argparse.Namespace, message: str) -> str:
    """Put the files into one commit; return the repository's address."""
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise RuntimeError('HF_HUB_OFFLINE=1 forbids to upload: unset it, and run it again')
    with readable_errors(args.repo):
        token = get_token()
    if token is None:
        raise RuntimeError('no token: hf auth login, or set HF_TOKEN')
    api = HfApi(token=token, library_name='timm-itpn', library_version=__version__)
    with readable_errors(args.repo):
        url = api.create_repo(args.repo, private=args.private or None, exist_ok=True)
        exposed = args.private and not api.model_info(args.repo).private
    if exposed:
        raise RuntimeError(f'{args.repo} is public: name another repository, or make it private at {url}/settings')
    # not upload_folder, which in new versions may make several commits
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(args.dir / name)) for name in FILES]
    with readable_errors(args.repo):
        if args.revision != 'main':
            api.create_branch(args.repo, branch=args.revision, exist_ok=True)
        api.create_commit(args.repo, operations, commit_message=message, revision=args.revision)
    return str(url)


@contextlib.contextmanager
def readable_errors(repo: str) -> Iterator[None]:
    """Turn errors of the Hub's client into a RuntimeError of one sentence."""
    try:
        yield
    except Exception as error:  # each version of the client has an HTTP library of its own, with its own errors
        sentence = explain(error, repo)
        if sentence is None:
            raise
        raise RuntimeError(sentence) from error


def explain(error: Exception, repo: str) -> str | None:
    """What went wrong with an upload, and what to do about it; None for what no client should raise."""
    from huggingface_hub import constants

    from ..weights.errors import HTTP_CLIENTS

    wraps = type(error) is RuntimeError and isinstance(error.__cause__, Exception)  # as around the upload of a file
    cause: Any = error.__cause__ if wraps else error
    status = getattr(getattr(cause, 'response', None), 'status_code', None)
    if status is not None:
        answer = ': '.join(filter(None, (f'HTTP {status}', getattr(cause, 'server_message', None))))
        if status in (401, 403):
            return (
                f'you are not allowed to write to {repo} ({answer}): '
                'hf auth login, or set HF_TOKEN, with a token that may write to it')
        later = ': run it again later' if status == 429 or status >= 500 else ''
        return f'the Hub did not take the upload to {repo} ({answer}){later}'
    of_client = type(cause).__module__.split('.')[0] in HTTP_CLIENTS and not isinstance(cause, ValueError)
    if of_client or isinstance(cause, (ConnectionError, TimeoutError)):  # ValueError: an answer that is no JSON
        return f'the Hub at {constants.ENDPOINT} cannot be reached ({one_line(cause)}): run it again'
    if isinstance(error, (OSError, RuntimeError, ValueError)) or type(error).__module__.startswith('huggingface_hub.'):
        return f'the upload to {repo} failed: {one_line(error)}'
    return None


def one_line(error: Exception) -> str:
    return ' '.join(str(error).split()) or type(error).__name__

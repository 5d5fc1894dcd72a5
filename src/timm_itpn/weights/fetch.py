"""From the name of a pretrained model to its weight file on this machine.

The README of this room says where it looks, in which order. Why a place does not give the file goes to the log, and
into the error if none does. What is downloaded is checked: it is whole, and has the known hash if there is one.
"""
import glob
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import LocalEntryNotFoundError, are_progress_bars_disabled
from torch.hub import get_dir

from .. import __version__
from .read import why_no_weight_file
from .sources import Source, drive_url, file_name, plain_name, source_of, why_not_expected

_logger = logging.getLogger(__name__)

DRIVE_TIMEOUT_S = 30.  # without a byte from the server
DRIVE_RETRIES = 4
HUB_FILE = 'model.safetensors'
Folder = str | Path | None
# finds the file on this machine, or downloads it if True; None if it is not there, RuntimeError if something went wrong
Find = Callable[[bool], Path | None]


def fetch(name: str, cache_dir: Folder = None) -> Path | None:
    """Find or download the weights of a model.

    Args:
        name: Registered name `arch.tag`, or `arch` of a model without published weights.
        cache_dir: Where downloads are kept, None for the usual caches of the Hub and of PyTorch.

    Returns:
        The file, None if nothing is published and the user has named no source.

    Raises:
        RuntimeError: No source has it; the message says why for each, and what to do.
    """
    reasons = []
    for place, find in _places(name, cache_dir):
        try:
            path = find(True)
        except RuntimeError as error:
            reasons.append(f'{place}: {error}')
            _logger.warning(f'{name} not from {place}: {error}')
            continue
        if path is not None:
            _logger.info(f'{name} from {place}: {path}')
            return path
        _logger.info(f'{name} is not in {place}')
    if reasons:
        raise RuntimeError(f'{name} could not be fetched. {" ".join(reasons)}')
    return None


def cached(name: str, cache_dir: Folder = None) -> Path | None:
    """The first file that the sources of a model hold on this machine; None if `fetch` would have to download."""
    return next(filter(None, (find(False) for _, find in _places(name, cache_dir))), None)


def _places(name: str, cache_dir: Folder) -> Iterator[tuple[str, Find]]:
    """Where weights may be: in words, and how they are found there."""
    folder, owner, source = os.environ.get('TIMM_ITPN_WEIGHTS'), os.environ.get('TIMM_ITPN_HUB'), source_of(name)
    if folder:
        if not Path(folder).is_dir():
            raise RuntimeError(f'TIMM_ITPN_WEIGHTS={folder} is not a folder: correct or unset it.')
        yield f'TIMM_ITPN_WEIGHTS={folder}', partial(_in_folder, Path(folder), name)
    if owner:
        repo = f'{owner}/{plain_name(name)}'
        yield f'Hub {repo}', partial(_on_hub, repo, HUB_FILE, cache_dir)
    if source and source.hub_repo:
        yield f'Hub {source.hub_repo}', partial(_on_hub, source.hub_repo, source.hub_path, cache_dir)
    if source:
        # where timm keeps what it downloads by URL
        target = (Path(cache_dir) if cache_dir else Path(get_dir()) / 'checkpoints') / file_name(name)
        yield 'Google Drive', partial(_on_drive, source, target)


def _in_folder(folder: Path, name: str, _: bool) -> Path | None:
    """A converted file or folder by the model's name, or an official file by its own."""
    names = [f'{each}{end}' for each in (name, plain_name(name)) for end in ('.safetensors', f'/{HUB_FILE}')]
    if source_of(name):
        names.append(file_name(name))
    return next((folder / each for each in names if (folder / each).is_file()), None)


def _on_hub(repo: str, path: str, cache_dir: Folder, download: bool) -> Path | None:
    held = try_to_load_from_cache(repo, path, cache_dir=cache_dir)
    before = Path(held) if isinstance(held, str) else None  # else the cache may say that the Hub has no such file
    if not download:
        return before
    for force in (False, True):  # damage may be in the cache: by a process that died, or by pieces put together wrongly
        try:
            file = Path(hf_hub_download(
                repo, path, cache_dir=cache_dir, force_download=force, library_name='timm-itpn',
                library_version=__version__))
        except Exception as error:  # by version of the client: its own, those of its HTTP library, OSError
            reason = 'HF_HUB_OFFLINE=1 forbids downloads' if constants.HF_HUB_OFFLINE else in_a_line(error)
            raise RuntimeError(f'{path} could not be downloaded ({reason}).') from error
        damage = why_no_weight_file(file)
        wrong = damage or why_not_expected(file)
        if not wrong:
            return file
        if constants.HF_HUB_OFFLINE:
            raise RuntimeError(f'{file} is {wrong}: go online once without HF_HUB_OFFLINE.')
        if not damage:  # whole, so it would come as it is once more
            break
    if file == before and not damage:  # the user's, who may need it
        raise RuntimeError(f'{file} is {wrong}: pass cache_dir= to download into another folder.')
    blob = file.resolve()  # the Hub's cache holds the bytes once, and links to them
    file.unlink()
    blob.unlink(missing_ok=True)
    raise RuntimeError(f'{path} is {wrong}; it was not kept.')


def _on_drive(source: Source, target: Path, download: bool) -> Path | None:
    if not download:
        return target if target.exists() else None
    try:
        if not target.is_file():
            _download_from_drive(source.drive_id, target)
    except (OSError, RuntimeError) as error:  # OSError: of the disk, and all of requests
        raise RuntimeError(
            f'{target.name} could not be downloaded ({in_a_line(error)}): run it again, or get it from '
            f'{drive_url(source)} with a browser and put it, by this name, in the folder that the environment variable '
            'TIMM_ITPN_WEIGHTS names.') from error
    return target


def _download_from_drive(file_id: str, target: Path) -> None:
    """Download with gdown, which goes on where an earlier download broke off; `target` exists only checked."""
    if constants.HF_HUB_OFFLINE:
        raise RuntimeError('HF_HUB_OFFLINE=1 forbids downloads')
    try:
        import filelock  # which gdown uses
        from gdown import DownloadError, download  # an extra; before version 6 without DownloadError
    except ImportError as error:
        raise RuntimeError("Google Drive needs gdown >= 6: pip install 'timm-itpn[drive]'") from error
    unchecked = target.with_name(f'{target.name}.unchecked')
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f'{target}.lock'):  # of several processes, the first downloads
        if target.is_file():
            return
        try:
            download(
                id=file_id, output=str(unchecked), resume=True, timeout=DRIVE_TIMEOUT_S, retries=DRIVE_RETRIES,
                use_cookies=False, quiet=are_progress_bars_disabled())
        except DownloadError as error:
            if 'byte range' in str(error):  # what was there is not of the file that is there now
                for part in target.parent.glob(f'{glob.escape(unchecked.name)}*.part'):
                    part.unlink()
            raise RuntimeError(str(error)) from error
        wrong = why_no_weight_file(unchecked) or why_not_expected(unchecked, target.name)
        if wrong:
            unchecked.unlink()
            raise RuntimeError(f'what came is {wrong}, and was not kept')
        unchecked.replace(target)


def in_a_line(error: Exception) -> str:
    """What a client or a server said, fit for a terminal."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the Hub's client says "check your connection" of a 403 or 429 too
    text = ' '.join(str(error).split()) or type(error).__name__
    return ''.join(c if c.isprintable() else ' ' for c in text).rstrip('.')

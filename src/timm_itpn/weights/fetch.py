"""From the name of a pretrained model to its weight file on this machine.

The sources are tried in this order; why one does not give the file goes to the log, and into the error if none does:
  1. the folder TIMM_ITPN_WEIGHTS, with official or converted files;
  2. repositories `arch.tag` of TIMM_ITPN_HUB, a user or organisation of the Hub;
  3. the published copy on the Hub;
  4. the authors' file on Google Drive.

What is downloaded is checked: it is whole, and has the known hash if there is one.
"""
import glob
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import WeakFileLock, are_progress_bars_disabled, validate_repo_id
from torch.hub import get_dir

from .. import __version__
from .errors import hub_failure, is_transient
from .integrity import sha256_of, why_no_weight_file
from .sources import drive_url, file_name, plain_name, source_of

__all__ = ['cached', 'fetch']

_logger = logging.getLogger(__name__)

PAUSES_S = (1., 4.)
DRIVE_TIMEOUT_S = 30.  # without a byte from the server
DRIVE_RETRIES = 4
HUB_FILE = 'model.safetensors'
Folder = str | Path | None


class _Candidate(NamedTuple):
    """Where weights may be.

    Attributes:
        words: For messages.
        get: Finds or downloads the file. None if it is not there, RuntimeError if something went wrong.
        held: The file if it is on this machine.
    """
    words: str
    get: Callable[[], Path | None]
    held: Callable[[], Path | None]


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
    for candidate in _candidates(name, cache_dir):
        try:
            path = candidate.get()
        except RuntimeError as error:
            reasons.append(f'{candidate.words}: {error}')
            _logger.warning(f'{name} not from {candidate.words}: {error}')
            continue
        if path is not None:
            _logger.info(f'{name} from {candidate.words}: {path}')
            return path
        _logger.info(f'{name} is not in {candidate.words}')
    if reasons:
        raise RuntimeError(f'{name} could not be fetched. {" ".join(reasons)}')
    return None


def cached(name: str, cache_dir: Folder = None) -> Path | None:
    """The first file that the sources of a model hold on this machine; None if `fetch` would have to download."""
    return next(filter(None, (candidate.held() for candidate in _candidates(name, cache_dir))), None)


def _candidates(name: str, cache_dir: Folder) -> list[_Candidate]:
    candidates = []
    folder, owner, source = os.environ.get('TIMM_ITPN_WEIGHTS'), os.environ.get('TIMM_ITPN_HUB'), source_of(name)
    if folder:
        if not Path(folder).is_dir():
            raise RuntimeError(f'TIMM_ITPN_WEIGHTS={folder} is not a folder: correct or unset it.')
        find = partial(_in_folder, Path(folder), name)
        candidates.append(_Candidate(f'TIMM_ITPN_WEIGHTS={folder}', find, find))
    if owner:
        try:
            validate_repo_id(f'{owner}/{plain_name(name)}')
        except HFValidationError as error:
            raise RuntimeError(f'TIMM_ITPN_HUB={owner} is not a user or organisation: correct or unset it.') from error
    on_hub: list[tuple[str, str, str | None]] = [(f'{owner}/{plain_name(name)}', HUB_FILE, None)] if owner else []
    if source and source.hub_repo:
        on_hub.append((source.hub_repo, source.hub_path, source.sha256))
    for repo, path, sha256 in on_hub:
        get = partial(_from_hub, repo, path, sha256, cache_dir)
        candidates.append(_Candidate(f'Hub {repo}', get, partial(_held_by_hub, repo, path, cache_dir)))
    if source:
        # where timm keeps what it downloads by URL
        target = (Path(cache_dir) if cache_dir else Path(get_dir()) / 'checkpoints') / file_name(name)
        get = partial(_from_drive, source.drive_id, drive_url(source), target, source.sha256)
        candidates.append(_Candidate('Google Drive', get, lambda: target if target.exists() else None))
    return candidates


def _in_folder(folder: Path, name: str) -> Path | None:
    """A converted file or folder by the model's name, or an official file by its own."""
    names = [f'{each}{end}' for each in (name, plain_name(name)) for end in ('.safetensors', f'/{HUB_FILE}')]
    if source_of(name):
        names.append(file_name(name))
    return next((folder / each for each in names if (folder / each).is_file()), None)


def _held_by_hub(repo: str, path: str, cache_dir: Folder) -> Path | None:
    found = try_to_load_from_cache(repo, path, cache_dir=cache_dir)
    return Path(found) if isinstance(found, str) else None


def _from_hub(repo: str, path: str, sha256: str | None, cache_dir: Folder) -> Path:
    before = _held_by_hub(repo, path, cache_dir)
    wrong = ''
    for force in (False, True):  # from the start if what came is wrong: an old client may have put pieces together
        try:
            file = _downloaded(repo, path, cache_dir, force)
            damage = why_no_weight_file(file)  # each time: a process may have died between download and check
            wrong = damage or _why_not_expected(file, sha256)
            if not wrong:
                return file
            if not damage and file == before:  # a whole file of the user's: it is not ours to delete
                raise RuntimeError(f'{file} is {wrong}: pass cache_dir= to download into another folder.')
            if constants.HF_HUB_OFFLINE:
                raise RuntimeError(f'{file} is {wrong}: go online once without HF_HUB_OFFLINE.')
            blob = file.resolve()  # the Hub's cache holds the bytes once, and links to them
            file.unlink(missing_ok=True)
            blob.unlink(missing_ok=True)
        except RuntimeError:
            raise
        except Exception as error:  # by client: its HTTP library's; what is not a failure of the Hub is raised again
            failure = hub_failure(error)
            if failure is None:
                raise
            raise RuntimeError(f'{path} {failure[0]}: {failure[1]}.') from error
    raise RuntimeError(f'{path} is {wrong}; it was not kept.')


def _why_not_expected(file: Path, sha256: str | None) -> str:
    found = sha256_of(file) if sha256 else None
    return '' if found == sha256 else f'another file than expected: its SHA-256 is {found}, not {sha256}'


def _downloaded(repo: str, path: str, cache_dir: Folder, force: bool) -> Path:
    """Download with the Hub's client, and again after a pause if it broke off; the client goes on where it was."""
    download = partial(
        hf_hub_download, repo, path, cache_dir=cache_dir, force_download=force, library_name='timm-itpn',
        library_version=__version__)
    for pause_s in PAUSES_S:
        try:
            return Path(download())
        except Exception as error:  # by client: its HTTP library's; what is not transient is raised again
            if not is_transient(error):
                raise
            time.sleep(pause_s)
    return Path(download())


def _from_drive(file_id: str, url: str, target: Path, sha256: str | None) -> Path:
    if not target.is_file():
        failure = _why_not_from_drive(file_id, target, sha256)
        if failure:
            raise RuntimeError(
                f'{target.name} could not be downloaded, {failure}, or get it from {url} with a browser and put it, by '
                'this name, in the folder that the environment variable TIMM_ITPN_WEIGHTS names.')
    return target


def _why_not_from_drive(file_id: str, target: Path, sha256: str | None) -> str:
    """Download to `target`; why that failed and what to do, '' if it is there now."""
    if constants.HF_HUB_OFFLINE:
        return 'HF_HUB_OFFLINE=1 forbids it: unset it'
    if not _has_gdown():
        return "downloads from there need gdown >= 6: pip install 'timm-itpn[drive]' and run it again"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock_file = target.with_name(f'{target.name}.lock')
        with WeakFileLock(lock_file):  # of several processes, the first downloads; nothing may be raised in here
            failure = '' if target.is_file() else _download_from_drive(file_id, target, sha256)
        if not failure:
            lock_file.unlink(missing_ok=True)  # whoever locks a new one finds the target there
        return failure
    except OSError as error:
        return f'{target.parent} cannot be used ({_in_a_line(error)}): set TORCH_HOME or pass cache_dir='


def _has_gdown() -> bool:
    try:
        return int(version('gdown').partition('.')[0]) >= 6
    except PackageNotFoundError:
        return False


def _download_from_drive(file_id: str, target: Path, sha256: str | None) -> str:
    """Download with gdown, which goes on where an earlier download broke off; `target` exists only checked."""
    import gdown  # an extra
    import requests  # which gdown uses

    unchecked = target.with_name(f'{target.name}.unchecked')
    download = partial(
        gdown.download, id=file_id, output=str(unchecked), resume=True, timeout=DRIVE_TIMEOUT_S,
        retries=DRIVE_RETRIES, use_cookies=False, quiet=are_progress_bars_disabled())
    try:
        try:
            download()
        except gdown.DownloadError as error:
            if 'byte range' not in str(error):
                raise
            for part in target.parent.glob(f'{glob.escape(unchecked.name)}*.part'):  # not of the file that is there now
                part.unlink()
            download()
        wrong = why_no_weight_file(unchecked) or _why_not_expected(unchecked, sha256)
        if wrong:
            unchecked.unlink()
            return f'what came is {wrong}, and was not kept: run it again in case that it was damaged on the way'
        unchecked.replace(target)
        return ''
    except gdown.FileURLRetrievalError as error:  # heading, reason and advice for gdown's own command
        reason = '\n'.join(str(error).split('\n\n')[1:2]) or str(error)
        return f'Drive does not give it ({_in_a_line(reason)}): try again tomorrow'
    except (requests.ConnectionError, requests.Timeout) as error:
        return f'drive.google.com cannot be reached ({type(error).__name__}): go online and run it again'
    except (gdown.DownloadError, OSError) as error:  # OSError: of the disk, and all of requests
        reason = str(error).partition('\n')[0] or type(error).__name__
        return f'{_in_a_line(reason)}: run it again to go on'


def _in_a_line(said: object) -> str:
    """What a server said, fit for a terminal."""
    text = ' '.join(str(said).split())
    return ''.join(c if c.isprintable() else ' ' for c in text).rstrip('.')

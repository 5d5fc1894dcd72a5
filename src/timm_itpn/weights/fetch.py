"""From the name of a pretrained model to its weight file on this machine.

The places are tried in this order; what a place cannot give, and why, goes to the log, and into the error if none can:
  1. the folder TIMM_ITPN_WEIGHTS, with official or converted files;
  2. repositories `arch.tag` of TIMM_ITPN_HUB, a user or organisation of the Hub, as `timm-itpn push` makes them;
  3. the published copy on the Hub;
  4. the authors' file on Google Drive.

What is downloaded is checked: it is whole, and has the known hash if there is one.
"""
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch.hub import get_dir

from .. import __version__
from . import drive
from .errors import hub_failure, is_transient
from .integrity import sha256_of, why_no_weight_file
from .records import expected_sha256
from .sources import file_name, plain_name, source_of

__all__ = ['cached', 'fetch']

_logger = logging.getLogger(__name__)

PAUSES_S = (1., 4.)
HUB_FILE = 'model.safetensors'
Folder = str | Path | None


class Place(NamedTuple):
    """Where weights may be.

    Attributes:
        words: For messages.
        get: Finds or downloads the file. None if the place does not have it, RuntimeError if something went wrong.
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
        The file, None if there is no place to look.

    Raises:
        RuntimeError: No place has it; the message says why for each, and what to do.
    """
    reasons = []
    for place in _places(name, cache_dir):
        try:
            path = place.get()
        except RuntimeError as error:
            reasons.append(f'{place.words}: {error}')
            _logger.warning(f'{name} not from {place.words}: {error}')
            continue
        if path is not None:
            _logger.info(f'{name} from {place.words}: {path}')
            return path
        _logger.info(f'{name} is not in {place.words}')
    if reasons:
        raise RuntimeError(f'{name} could not be fetched. {" ".join(reasons)}')
    return None


def cached(name: str, cache_dir: Folder = None) -> Path | None:
    """The first file that the places of a model hold on this machine; None if `fetch` would have to download."""
    return next(filter(None, (place.held() for place in _places(name, cache_dir))), None)


def _places(name: str, cache_dir: Folder) -> list[Place]:
    places = []
    folder, owner, source = os.environ.get('TIMM_ITPN_WEIGHTS'), os.environ.get('TIMM_ITPN_HUB'), source_of(name)
    if folder:
        if not Path(folder).is_dir():
            raise RuntimeError(f'TIMM_ITPN_WEIGHTS={folder} is no folder: correct or unset it.')
        find = partial(_in_folder, Path(folder), name)
        places.append(Place(f'TIMM_ITPN_WEIGHTS={folder}', find, find))
    if owner:
        try:
            validate_repo_id(f'{owner}/{plain_name(name)}')
        except HFValidationError as error:
            raise RuntimeError(f'TIMM_ITPN_HUB={owner} is no user or organisation: correct or unset it.') from error
    on_hub: list[tuple[str, str, str | None]] = [(f'{owner}/{plain_name(name)}', HUB_FILE, None)] if owner else []
    if source and source.hub_repo:
        on_hub.append((source.hub_repo, source.hub_path, expected_sha256(name)))
    for repo, path, sha256 in on_hub:
        get = partial(_from_hub, repo, path, sha256, cache_dir)
        places.append(Place(f'Hub {repo}', get, partial(_held_by_hub, repo, path, cache_dir)))
    if source:
        # where timm keeps what it downloads by URL
        target = (Path(cache_dir) if cache_dir else Path(get_dir()) / 'checkpoints') / file_name(name)
        get = partial(drive.download, source.drive_id, target, expected_sha256(name))
        places.append(Place('Google Drive', get, lambda: target if target.exists() else None))
    return places


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
            wrong = why_no_weight_file(file)  # each time: a process may have died between download and check
            found = sha256_of(file) if sha256 and not wrong else sha256
            if found != sha256 and file == before:  # a whole file of the user's: it is not ours to delete
                raise RuntimeError(f'{file} has the SHA-256 {found}, not {sha256} as expected: remove or rename it.')
            if found != sha256:
                wrong = f'another file than expected: its SHA-256 is {found}, not {sha256}'
            if not wrong:
                return file
            if constants.HF_HUB_OFFLINE:
                raise RuntimeError(f'{file} is {wrong}: go online once without HF_HUB_OFFLINE.')
            blob = file.resolve()  # the Hub's cache holds the bytes once, and links to them
            file.unlink(missing_ok=True)
            blob.unlink(missing_ok=True)
        except RuntimeError:
            raise
        except Exception as error:  # by client: its HTTP library's; what is no failure of the Hub is raised again
            failure = hub_failure(error)
            if failure is None:
                raise
            raise RuntimeError(f'{path} {failure[0]}: {failure[1]}.') from error
    raise RuntimeError(f'{path} is {wrong}; it was not kept.')


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

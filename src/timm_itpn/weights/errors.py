"""One clear sentence for each way in which fetching or reading a weight file fails."""
import contextlib
import errno
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from timm.models import resolve_pretrained_cfg

from .integrity import why_no_weight_file

__all__ = ['hub_failure', 'is_transient', 'readable_file_errors', 'readable_load_errors']

STORAGE_ERRORS = (
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS)
HTTP_CLIENTS = ('httpx', 'httpx2', 'requests')  # those of old and new versions of huggingface_hub


@contextlib.contextmanager
def readable_load_errors(variant: str, kwargs: dict[str, Any]) -> Iterator[None]:
    """Turn errors of the loaders into a RuntimeError that says which file is wrong, how, and what to do.

    Args:
        variant: Registered model name.
        kwargs: Arguments of `build_model_with_cfg`, which say where the weights come from.
    """
    try:
        yield
    except Exception as error:  # loaders raise all kinds on bad files; what has no sentence is raised again
        cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
        sentence = _explain(error, cfg)
        if sentence is None:
            raise
        raise RuntimeError(sentence) from error


@contextlib.contextmanager
def readable_file_errors(path: Path) -> Iterator[None]:
    """Turn errors of reading a weight file into a RuntimeError that says what is wrong with it."""
    try:
        yield
    except Exception as error:  # loaders raise all kinds on bad files; what has no sentence is raised again
        sentence = file_failure(error, str(path))
        if sentence is None:
            raise
        raise RuntimeError(sentence) from error


def hub_failure(error: Exception) -> tuple[str, str] | None:
    """What went wrong with a download from the Hub, and what to do about it; None for errors of other kinds."""
    if isinstance(error, LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return 'is not in the local cache, and HF_HUB_OFFLINE forbids to download it', 'go online once without it'
        return 'is not in the local cache and the Hub cannot be reached', 'go online once'
    if isinstance(error, (EntryNotFoundError, HfHubHTTPError, HFValidationError)):
        return f'cannot be had from the Hub ({_first_line(error)})', 'check name and revision'
    if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
        return (
            f'cannot be stored ({error})',
            'free space there, or name another folder with HF_HOME or cache_dir=, and run it again')
    if is_transient(error):
        return f'could not be downloaded whole ({_first_line(error)})', 'run it again to go on'
    return None


def is_transient(error: Exception) -> bool:
    """True if a download broke off for a reason that the next try may not meet."""
    if isinstance(error, HfHubHTTPError):
        return getattr(error.response, 'status_code', 0) >= 500
    if isinstance(error, (ConnectionError, TimeoutError)) or 'Consistency check failed' in str(error):
        return True
    return type(error).__module__.split('.')[0] in HTTP_CLIENTS


def _first_line(error: Exception) -> str:
    return str(error).strip().partition('\n')[0] or type(error).__name__


def _explain(error: Exception, cfg: Any) -> str | None:
    message = str(error)
    source = cfg.file or '/'.join(filter(None, (cfg.hf_hub_id, cfg.hf_hub_filename))) or str(cfg.url or '')
    instead = 'pass a local copy with pretrained_cfg_overlay=dict(file=...)'
    if not source and 'No pretrained weights exist' in message:
        name = f'{cfg.architecture}.{cfg.tag}' if cfg.tag else cfg.architecture
        return f'{name} has no published weights: create it without pretrained=True, or {instead}.'
    failure = None if cfg.file else hub_failure(error)
    if failure is not None:
        return f'{source} {failure[0]}: {failure[1]}, or {instead}.'
    return file_failure(error, source)


def file_failure(error: Exception, source: str) -> str | None:
    """What is wrong with a weight file, by what its loader raised; None for errors of other kinds."""
    message = str(error)
    if isinstance(error, AttributeError) and "has no attribute 'items'" in message:
        return f'{source} holds no dict of tensors.'
    if isinstance(error, FileNotFoundError):
        return f'{source} does not exist.'
    unsafe = _unsafe_globals(error)
    if unsafe:
        return (
            f'{source} holds pickled objects besides tensors ({unsafe}), so it was not loaded and none of its code was '
            'run. Save its state dict alone where it was made. Or, if you know these classes to be harmless, allow '
            'just them with torch.serialization.add_safe_globals([...]) in Python; do not switch weights_only off.')
    unreadable = (EOFError, pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError)
    signs = ('PytorchStreamReader', 'weights_only=True blocked')
    if isinstance(error, unreadable) or _raised_by_unpickler(error) or any(sign in message for sign in signs):
        path = Path(source)
        if path.is_file() and not why_no_weight_file(path):
            return (
                f'{source} is a whole file, but holds pickled objects besides tensors, so it was not loaded and none '
                'of its code was run. Save its state dict alone where it was made.')
        size = f' ({path.stat().st_size} bytes)' if path.is_file() else ''
        return f'{source}{size} is empty, truncated or no weight file: delete it and fetch it again.'
    return None


def _raised_by_unpickler(error: Exception) -> bool:
    """True for what torch's unpickler raises by mistake on files that are no pickles, such as KeyError."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get('__name__') == 'torch._weights_only_unpickler'


def _unsafe_globals(error: Exception) -> str:
    """Names of the classes and functions that a pickle wanted, as far as timm and torch tell; '' for other errors."""
    listed = re.search(r'Unsupported globals: (.+?)\. ', str(error))
    first = re.search(r'Unsupported global: GLOBAL (\S+)', f'{error} {error.__cause__}')
    found = listed or first
    return found[1] if found else ''

"""One clear sentence for each way in which fetching a weight file fails."""
import contextlib
import errno
from collections.abc import Iterator
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from timm.models import resolve_pretrained_cfg

__all__ = ['hub_failure', 'is_transient', 'readable_load_errors']

STORAGE_ERRORS = (
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS)
HTTP_CLIENTS = ('httpx', 'httpx2', 'requests')  # of old and new versions of huggingface_hub


@contextlib.contextmanager
def readable_load_errors(variant: str, kwargs: dict[str, Any]) -> Iterator[None]:
    """Turn errors of timm's own downloads into a RuntimeError that says what is wrong and what to do.

    Args:
        variant: Registered model name.
        kwargs: Arguments of `build_model_with_cfg`, which say where the weights come from.
    """
    try:
        yield
    except Exception as error:  # by client: its HTTP library's; what is not a failed download is raised again
        cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
        source = '/'.join(filter(None, (cfg.hf_hub_id, cfg.hf_hub_filename)))
        instead = 'pass a local copy with pretrained_cfg_overlay=dict(file=...)'
        if not (cfg.file or source or cfg.url) and 'No pretrained weights exist' in str(error):
            name = f'{cfg.architecture}.{cfg.tag}' if cfg.tag else cfg.architecture
            raise RuntimeError(
                f'{name} has no published weights: create it without pretrained=True, or {instead}.') from error
        failure = hub_failure(error) if source else None
        if failure is None:
            raise
        raise RuntimeError(f'{source} {failure[0]}: {failure[1]}, or {instead}.') from error


def hub_failure(error: Exception) -> tuple[str, str] | None:
    """What went wrong with a download from the Hub, and what to do about it; None for errors of other kinds."""
    if isinstance(error, LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return 'is not in the local cache, and HF_HUB_OFFLINE=1 forbids downloads', 'unset HF_HUB_OFFLINE once'
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

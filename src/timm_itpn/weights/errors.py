"""One clear sentence for each way in which fetching or reading a weight file fails."""
import contextlib
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, Dict, Iterator, Optional

from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from timm.models import resolve_pretrained_cfg

__all__ = ['readable_load_errors']

HTTP_CLIENTS = ('httpx', 'httpx2', 'requests')  # those of old and new versions of huggingface_hub


@contextlib.contextmanager
def readable_load_errors(variant: str, kwargs: Dict[str, Any]) -> Iterator[None]:
    """Turn errors of the loaders into a RuntimeError that says which file is wrong, how, and what to do.

    Args:
        variant: Registered model name.
        kwargs: Arguments of `build_model_with_cfg`, which say where the weights come from.
    """
    try:
        yield
    except Exception as error:
        cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
        sentence = _explain(error, cfg)
        if sentence is None:
            raise
        raise RuntimeError(sentence) from error


def _explain(error: Exception, cfg: Any) -> Optional[str]:
    message = str(error)
    source = cfg.file or '/'.join(filter(None, (cfg.hf_hub_id, cfg.hf_hub_filename))) or cfg.url or ''
    instead = 'pass a local copy with pretrained_cfg_overlay=dict(file=...)'
    if not source and 'No pretrained weights exist' in message:
        name = f'{cfg.architecture}.{cfg.tag}' if cfg.tag else cfg.architecture
        if not cfg.origin_url:
            return f'{name} has no published weights: create it without pretrained=True, or {instead}.'
        return f'{name} cannot be downloaded automatically: get it from {cfg.origin_url}, then {instead}.'
    if isinstance(error, LocalEntryNotFoundError):
        return f'{source} is not in the local cache and the Hub cannot be reached: go online once, or {instead}.'
    if isinstance(error, (EntryNotFoundError, HfHubHTTPError)):
        reason = message.splitlines()[0]
        return f'{source} cannot be had from the Hub ({reason}): check name and revision, or {instead}.'
    if isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.split('.')[0] in HTTP_CLIENTS:
        return f'The download of {source} broke off ({message}): run it again to go on, or {instead}.'
    if isinstance(error, AttributeError) and "has no attribute 'items'" in message:
        return f'{source} holds no dict of tensors.'
    if isinstance(error, FileNotFoundError):
        return f'{source} does not exist.'
    unsafe = _unsafe_globals(error)
    if unsafe:
        return (
            f'{source} holds pickled objects besides tensors ({unsafe}), so it was not loaded and none of its code was '
            'run. If you know these classes to be harmless, allow just them with '
            'torch.serialization.add_safe_globals([...]) and load again; do not switch weights_only off.')
    unreadable = (EOFError, pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError)
    signs = ('PytorchStreamReader', 'weights_only=True blocked')
    if isinstance(error, unreadable) or _raised_by_unpickler(error) or any(sign in message for sign in signs):
        path = Path(source)
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
    first = re.search(r'Unsupported global: GLOBAL (\S+)', str(error.__cause__))
    found = listed or first
    return found[1] if found else ''

"""Hashes that the user has recorded: SHA-256 of a weight file by `arch.tag`, where none was published.

The record is a JSON file in the user's configuration folder, or the file that TIMM_ITPN_HASHES names.
"""
import json
import os
from pathlib import Path

from ..files import replaced
from .sources import plain_name, source_of

__all__ = ['expected_sha256', 'record', 'record_file']


def record_file() -> Path:
    named = os.environ.get('TIMM_ITPN_HASHES')
    if named:
        return Path(named)
    return Path(os.environ.get('XDG_CONFIG_HOME') or Path.home() / '.config') / 'timm_itpn' / 'sha256.json'


def recorded() -> dict[str, str]:
    try:
        path = record_file()
    except RuntimeError:  # no home folder, so nothing was recorded there
        return {}
    try:
        hashes = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RuntimeError(f'{path} is no JSON file that can be read ({error}): mend or remove it.') from error
    if not isinstance(hashes, dict):
        raise RuntimeError(f'{path} holds no names with hashes: mend or remove it.')
    return {name: str(sha256).lower() for name, sha256 in hashes.items()}


def expected_sha256(name: str) -> str | None:
    """Hash of the published file of a model `arch.tag`: the published one, else the user's record, else None."""
    source = source_of(name)
    return (source.sha256 if source else None) or recorded().get(plain_name(name))


def record(name: str, sha256: str) -> Path:
    """Record the hash of a model's file.

    Args:
        name: Model `arch.tag`, with or without `_fpn`.
        sha256: Hash in hex.

    Returns:
        The file that holds the records.

    Raises:
        ValueError: The model has no published file, or another hash of it is known already.
    """
    if source_of(name) is None:
        raise ValueError(f'{name} has no published file, so there is nothing to record.')
    known = expected_sha256(name)
    if known not in (None, sha256):
        raise ValueError(f'The known SHA-256 of {name} is {known}, this file has {sha256}: it is another file.')
    path = record_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as part:
        part.write_text(json.dumps({**recorded(), plain_name(name): sha256}, indent=2) + '\n', encoding='utf-8')
    return path

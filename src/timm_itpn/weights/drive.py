"""Download of public files of Google Drive, which has no client library that is small and no checksums to ask for.

What can go wrong on the way ends as one sentence, or as a file that is whole and checked. While a download goes on,
three files lie beside its target `NAME`, and are gone when it is done:
- `NAME.incomplete`: the bytes so far.
- `NAME.incomplete.json`: how long the file is that they are of, and its ETag and Last-Modified, without which a later
  run could not tell whether Drive still has that same file, and would glue two different files together.
- `NAME.lock`: held by the process that downloads.
"""
import contextlib
import errno
import http.client
import itertools
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock, tqdm

from .drive_page import Page
from .integrity import HEAD_BYTES, is_web_page, is_weight_start, sha256_of, why_no_weight_file

__all__ = ['download']

ENDPOINT = 'https://drive.usercontent.google.com/download'
TIMEOUT_S = 30.  # without a byte from the server
PAUSES_S = (1., 2., 4., 8.)  # before the next tries, as long as they bring nothing new; then it is given up
CHUNK_BYTES = 1 << 20
PAGE_BYTES = 1 << 18  # no page of Drive's is as long
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NETWORK_ERRORS = (OSError, http.client.HTTPException, ValueError)  # ValueError: an address that is none
NO_SUCH_RANGE = 416
TRANSIENT = (408, NO_SUCH_RANGE)  # and all from 500 on
REFUSALS = {  # by status: what it means, what to do
    401: ('the file is not public', 'ask its owner to share it'),
    403: ('the file is not public, or too many have fetched it lately', 'try again tomorrow'),
    404: ('there is no such file', 'look whether its owner has moved it'),
    429: ('too many requests came from here', 'wait an hour and run it again'),
}


class _Failure(Exception):
    """What ends the download, with what to do about it; becomes a part of a sentence."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f'{reason}: {advice}')


class _BrokeOff(Exception):
    """An attempt ended early, for a reason that the next one may not meet.

    Attributes:
        start_over: The bytes so far are of no use.
    """

    def __init__(self, reason: str, start_over: bool = False) -> None:
        super().__init__(reason)
        self.start_over = start_over


class _Origin(NamedTuple):
    """Which file some bytes are of, as far as the server tells."""
    total: int | None  # bytes
    etag: str
    last_modified: str

    def is_same(self, other: '_Origin') -> bool:
        # an answer to If-Range need not repeat Last-Modified
        pairs = ((self.etag, other.etag), (self.last_modified, other.last_modified))
        return self.total == other.total and all(a == b for a, b in pairs if a and b)


def download(file_id: str, target: Path, sha256: str | None = None) -> Path:
    """Download a file once; a target that exists is returned as it is.

    A download that broke off, by whatever means, goes on where it was with the next call. Several processes may ask for
    one target: the first downloads it, and the others wait for it.

    Args:
        file_id: Id of a public file of Google Drive.
        target: Where to put it; its folder is made if need be. It exists only whole and checked.
        sha256: Hex digest that the file must have.

    Raises:
        RuntimeError: It cannot be had, or is not what it should be; the message says why and what to do.
    """
    try:
        if target.is_file():
            return target
        if constants.HF_HUB_OFFLINE:
            raise _Failure('HF_HUB_OFFLINE=1 forbids it', 'unset it')
        target.parent.mkdir(parents=True, exist_ok=True)
        lock_file = target.with_name(f'{target.name}.lock')
        with WeakFileLock(lock_file) as lock:
            try:
                if not target.is_file():
                    _fetch(file_id, target, sha256)
            finally:
                lock.release()  # old versions of WeakFileLock keep the lock when an exception passes
        with contextlib.suppress(OSError):
            lock_file.unlink()  # safe now only: whoever locks a new one finds the target there
    except _Failure as failure:
        raise RuntimeError(_sentence(file_id, target, failure)) from failure
    except OSError as error:  # of the disk: those of the network are caught where they arise
        raise RuntimeError(_sentence(file_id, target, _disk_problem(error, target.parent))) from error
    return target


def _fetch(file_id: str, target: Path, sha256: str | None) -> None:
    """Download, check and put in place, with the lock held."""
    partial = _Partial(target)
    furthest, pauses = partial.num_bytes if partial.origin else 0, iter(PAUSES_S)
    while True:
        try:
            _attempt(file_id, partial)
            break
        except _BrokeOff as reason:
            if partial.num_bytes > furthest:
                furthest, pauses = partial.num_bytes, iter(PAUSES_S)
            if reason.start_over:
                partial.discard()
            pause_s = next(pauses, None)
            if pause_s is None:
                raise _Failure(f'the connection failed again and again ({reason})', 'run it again to go on') from reason
            time.sleep(pause_s)
    wrong = why_no_weight_file(partial.path) or _why_not_the_known_one(partial.path, sha256)
    if wrong:
        partial.discard()
        raise _Failure(f'what came is {wrong}', 'run it again in case that it was damaged on the way')
    partial.finish(target)


def _why_not_the_known_one(path: Path, sha256: str | None) -> str:
    found = sha256_of(path) if sha256 else ''
    if sha256 and found != sha256.lower():
        return f'not the file that it should be (SHA-256 expected: {sha256}, found: {found})'
    return ''


class _Partial:
    """The bytes so far, and beside them which file they are of."""

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(f'{target.name}.incomplete')
        self.origin_path = target.with_name(f'{target.name}.incomplete.json')

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def origin(self) -> _Origin | None:
        """None if there is nothing to go on with."""
        try:
            origin = _Origin(**json.loads(self.origin_path.read_text()))
            return origin if 0 < self.num_bytes <= (origin.total or 0) else None
        except (FileNotFoundError, TypeError, ValueError):  # a process was killed before or while writing it
            return None

    def start(self, origin: _Origin) -> None:
        """Empty it, then say what it will be of; in this order, so that old bytes are never taken for new ones."""
        self.path.open('wb').close()
        self.origin_path.write_text(json.dumps(origin._asdict()))

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.origin_path.unlink(missing_ok=True)

    def finish(self, target: Path) -> None:
        with self.path.open('rb+') as file:
            os.fsync(file.fileno())
        os.replace(self.path, target)
        self.origin_path.unlink(missing_ok=True)


def _attempt(file_id: str, partial: _Partial) -> None:
    """Ask for what is missing and append what comes; `_BrokeOff` if not all came, `_Failure` if Drive refuses."""
    origin, headers = partial.origin, {'User-Agent': 'timm_itpn'}
    if origin:
        if origin.total == partial.num_bytes:
            return
        headers['Range'] = f'bytes={partial.num_bytes}-'
        validator = origin.last_modified if origin.etag.startswith('W/') else origin.etag or origin.last_modified
        if validator:
            headers['If-Range'] = validator
    url = f'{ENDPOINT}?{urllib.parse.urlencode(dict(id=file_id, export="download", confirm="t"))}'
    for _ in range(2):  # the file, or a page that asks first whether to go on, and then the file
        with _open(url, headers) as response:
            total, chunks = response.length, _chunks(response)  # the length counts down in newer versions of Python
            head = b'' if response.status == 206 else _at_least(HEAD_BYTES, chunks)
            if response.status == 206 or not _is_page(head, response):
                _save(response, total, itertools.chain([head], chunks), partial)
                return
            page = Page(_at_least(PAGE_BYTES, itertools.chain([head], chunks)), response.url, ENDPOINT)
        if not page.next_url:
            break
        url = page.next_url
    said = f' ("{page.said}")' if page.said else ''
    raise _Failure(f'Google Drive answered with a web page instead of it{said}', 'try again tomorrow')


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    """Ask for an address and follow redirects."""
    opener = urllib.request.build_opener(_Redirects)
    try:
        return opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code >= 500 or error.code in TRANSIENT:
            raise _BrokeOff(f'Google Drive answered {error.code}', error.code == NO_SUCH_RANGE) from error
        meaning = 'a redirect that is endless or leads astray' if 300 <= error.code < 400 else 'it refuses'
        reason, advice = REFUSALS.get(error.code, (meaning, 'try again tomorrow'))
        raise _Failure(f'Google Drive answered {error.code}, {reason}', advice) from error
    except NETWORK_ERRORS as error:
        raise _BrokeOff(str(getattr(error, 'reason', error)) or type(error).__name__) from error


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https, and from https only to https; urllib alone would also go to ftp."""

    def redirect_request(
            self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str,
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).scheme not in ('https', req.type):
            raise urllib.error.HTTPError(req.full_url, code, f'redirected to {newurl}', headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Body of an answer, in pieces as they come in, so that none is lost when the connection is."""
    remaining = response.length
    while remaining is None or remaining > 0:
        try:
            chunk = response.read1(CHUNK_BYTES if remaining is None else min(CHUNK_BYTES, remaining))
        except NETWORK_ERRORS as error:
            raise _BrokeOff(str(error) or type(error).__name__) from error
        if not chunk:
            if remaining:
                raise _BrokeOff(f'it ended {remaining} bytes too early')
            return
        remaining = None if remaining is None else remaining - len(chunk)
        yield chunk


def _at_least(num_bytes: int, chunks: Iterator[bytes]) -> bytes:
    """So many bytes of the next pieces, or some more, or what there is."""
    data = b''
    for chunk in chunks:
        data += chunk
        if len(data) >= num_bytes:
            break
    return data


def _save(
        response: http.client.HTTPResponse, total: int | None, chunks: Iterator[bytes], partial: _Partial,
) -> None:
    """Append an answer to the bytes so far, or put it in their place if it is the whole file, of `total` bytes."""
    headers, known, offset = response.headers, partial.origin, 0
    if response.status == 206:
        match = re.fullmatch(r'bytes (\d+)-\d+/(\d+)', headers.get('Content-Range', ''))
        offset, total = (int(match[1]), int(match[2])) if match else (-1, None)
    origin = _Origin(total, headers.get('ETag', ''), headers.get('Last-Modified', ''))
    if response.status != 206:
        partial.start(origin)
    elif known is None or offset != partial.num_bytes or not origin.is_same(known):
        raise _BrokeOff('the file on the server changed in between', start_over=True)
    bar = tqdm(total=total, initial=offset, unit='B', unit_scale=True, desc=partial.path.stem)
    with bar, partial.path.open('ab') as file:
        for chunk in chunks:
            file.write(chunk)
            bar.update(len(chunk))
    if total is not None and partial.num_bytes != total:
        raise _BrokeOff(f'{partial.num_bytes} of {total} bytes came')


def _is_page(head: bytes, response: http.client.HTTPResponse) -> bool:
    """The bytes decide; the content type only where they do not tell."""
    return is_web_page(head) or response.headers.get_content_type() == 'text/html' and not is_weight_start(head)


def _disk_problem(error: OSError, folder: Path) -> _Failure:
    if error.errno in DISK_FULL:
        return _Failure(
            f'there is no space left in {folder} ({error.strerror})', 'free some and run it again, what came is kept')
    return _Failure(f'{folder} cannot be used ({error.strerror})', 'set TORCH_HOME or pass cache_dir= to use another')


def _sentence(file_id: str, target: Path, failure: _Failure) -> str:
    sentence = (
        f'{target.name} could not be downloaded, {failure}, or get it from https://drive.google.com/file/d/{file_id} '
        'with a browser and put it, by this name, in the folder that the environment variable TIMM_ITPN_WEIGHTS names.')
    return ''.join(c if c.isprintable() else ' ' for c in sentence)  # what a server said may command the terminal

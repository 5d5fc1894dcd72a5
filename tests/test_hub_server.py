"""The tests' own Hub against the real client: what is there comes down, and what shall go wrong does."""
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from support.hub_server import Fault

REPO = 'someone/model'
WEIGHTS = bytes(range(256)) * 1000


def get(hub, path, **headers):
    """Status, headers and body of an answer, without a client that helps itself."""
    try:
        with urllib.request.urlopen(urllib.request.Request(hub.endpoint + path, headers=headers)) as answer:
            return SimpleNamespace(status=answer.status, headers=answer.headers, body=answer.read())
    except urllib.error.HTTPError as error:
        return SimpleNamespace(status=error.code, headers=error.headers, body=error.read())


@pytest.mark.parametrize('repo, name, revision, error', [
    ('someone/absent', 'w.pt', 'main', RepositoryNotFoundError), (REPO, 'absent', 'main', EntryNotFoundError),
    (REPO, 'w.pt', 'absent', RevisionNotFoundError)])
def test_what_is_not_there_is_told(repo, name, revision, error, path, tmp_path):
    with pytest.raises(error):
        hf_hub_download(repo, name, revision=revision, cache_dir=tmp_path)


def test_branches_and_commits_are_apart(hub, tmp_path):
    first = hub.commit(REPO, {'w.pt': b'1'})
    hub.commit(REPO, {'w.pt': b'2'})
    hub.commit(REPO, {'w.pt': b'3'}, branch='dev/x')
    for revision, content in ((first, b'1'), ('main', b'2'), ('dev/x', b'3')):
        with open(hf_hub_download(REPO, 'w.pt', revision=revision, cache_dir=tmp_path), 'rb') as file:
            assert file.read() == content


@pytest.fixture
def path(hub):
    hub.commit(REPO, {'w.pt': WEIGHTS})
    return f'/{REPO}/resolve/main/w.pt'


@pytest.mark.parametrize('status', [401, 403, 404, 500, 503])
def test_fault_hits_the_next_request_once(status, hub, path):
    hub.faults.append(Fault(status=status, headers={'Retry-After': '0'}))
    answer = get(hub, path)
    assert (answer.status, answer.headers['Retry-After'], hub.downloads) == (status, '0', [])
    assert get(hub, path).body == WEIGHTS and hub.downloads == [(REPO, 'w.pt')]


def test_fault_waits_for_the_request_it_fits(hub, path, tmp_path):
    hub.faults += [Fault(path='other'), Fault(method='HEAD', status=404)]
    assert get(hub, path).body == WEIGHTS
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, 'w.pt', cache_dir=tmp_path)
    assert hub.faults == [Fault(path='other')]


def test_other_pages_and_types_are_sent(hub, path):
    html = {'Content-Type': 'text/html'}
    hub.faults += [Fault(body=b'<html>', headers=html), Fault(headers=html)]
    page, file = get(hub, path), get(hub, path)
    assert (page.status, page.body, page.headers['Content-Type']) == (200, b'<html>', 'text/html')
    assert (file.status, file.body, file.headers['Content-Type']) == (200, WEIGHTS, 'text/html')


@pytest.mark.parametrize('kind', ['absolute', 'relative'])
def test_client_follows_redirects(kind, hub, path, tmp_path):
    hub.faults += [Fault(method='HEAD', redirect=kind), Fault(redirect=kind)]
    with open(hf_hub_download(REPO, 'w.pt', cache_dir=tmp_path), 'rb') as file:
        assert file.read() == WEIGHTS
    assert not hub.faults and hub.downloads == [(REPO, 'w.pt')]


def test_client_gets_over_a_cut_and_slow_connection(hub, path, tmp_path):
    hub.faults += [Fault(cut_after=1000), Fault(pause_s=1e-4)]
    try:
        found = hf_hub_download(REPO, 'w.pt', cache_dir=tmp_path)
    except OSError:  # old clients want to be called again
        found = hf_hub_download(REPO, 'w.pt', cache_dir=tmp_path)
    with open(found, 'rb') as file:
        assert file.read() == WEIGHTS
    assert not hub.faults and hub.downloads == [(REPO, 'w.pt')] * 2


def test_parts_of_files_are_sent(hub, path):
    part = get(hub, path, Range='bytes=10-19')
    assert (part.status, part.body) == (206, WEIGHTS[10:20])
    assert part.headers['Content-Range'] == f'bytes 10-19/{len(WEIGHTS)}'
    assert get(hub, path, Range=f'bytes={len(WEIGHTS)}-').status == 416

"""The tests' own Hub against the real client: what goes up comes down, and what shall go wrong does."""
import json
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from support.hub_server import TOKEN, Fault

REPO = 'someone/model'
WEIGHTS = bytes(range(256)) * 1000


@pytest.fixture
def api(hub):
    api = HfApi(token=TOKEN)
    api.create_repo(REPO)
    return api


def upload(api, files, **kwargs):
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    return api.create_commit(REPO, operations, commit_message='some files', **kwargs)


def get(hub, path, **headers):
    """Status, headers and body of an answer, without a client that helps itself."""
    try:
        with urllib.request.urlopen(urllib.request.Request(hub.endpoint + path, headers=headers)) as answer:
            return SimpleNamespace(status=answer.status, headers=answer.headers, body=answer.read())
    except urllib.error.HTTPError as error:
        return SimpleNamespace(status=error.code, headers=error.headers, body=error.read())


def test_what_goes_up_comes_down(hub, api, tmp_path):
    (tmp_path / 'folder').mkdir()
    files = {'model.safetensors': WEIGHTS, 'config.json': b'{"a": "\xc3\xa4"}', 'README.md': b'hello\n'}
    for name, content in files.items():
        (tmp_path / 'folder' / name).write_bytes(content)
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / 'folder', commit_message='one folder')
    for name, content in files.items():
        path = hf_hub_download(REPO, name, cache_dir=tmp_path / 'cache')
        with open(path, 'rb') as file:
            assert file.read() == content
    assert sorted(hub.uploads) == sorted((REPO, name) for name in files)
    assert sorted(hub.downloads) == sorted(hub.uploads)
    assert list(hub.objects.values()) == [WEIGHTS]  # the others went with the commit
    assert [commit.message for commit in hub.repos[REPO].commits.values()] == ['', 'one folder']
    assert sorted(api.list_repo_files(REPO)) == ['.gitattributes', *sorted(files)]
    assert api.file_exists(REPO, 'config.json') and not api.file_exists(REPO, 'absent')
    assert api.repo_info(REPO).sha == hub.repos[REPO].branches['main']


def test_second_commit_keeps_other_files_and_an_empty_one_is_not_made(hub, api):
    upload(api, {'a.safetensors': WEIGHTS, 'a.json': b'1'})
    second = upload(api, {'a.json': b'2', 'b.safetensors': WEIGHTS})
    assert len(hub.repos[REPO].commits) == 3 and hub.repos[REPO].branches == {'main': second.oid}
    files = hub.files(REPO)
    assert (files['a.safetensors'], files['b.safetensors'], files['a.json']) == (WEIGHTS, WEIGHTS, b'2')
    assert upload(api, {'a.json': b'2', 'b.safetensors': WEIGHTS}).oid == second.oid


def test_branches_are_apart(hub, api):
    with pytest.raises(HfHubHTTPError):
        upload(api, {'a.json': b'1'}, revision='dev/x')
    api.create_branch(REPO, branch='dev/x')
    api.create_branch(REPO, branch='dev/x', exist_ok=True)
    upload(api, {'a.json': b'1'}, revision='dev/x')
    assert hub.files(REPO, 'dev/x')['a.json'] == b'1' and 'a.json' not in hub.files(REPO)


@pytest.mark.parametrize('token', [False, 'hf_wrong'])
def test_writing_needs_the_token(token, hub, api):
    stranger = HfApi(token=token)
    for write in (
            lambda: stranger.create_repo('someone/other'),
            lambda: stranger.create_branch(REPO, branch='x'),
            lambda: upload(stranger, {'a.json': b'1'}),
            lambda: upload(stranger, {'a.safetensors': WEIGHTS}),
    ):
        with pytest.raises(HfHubHTTPError) as refusal:
            write()
        assert refusal.value.response.status_code == 401
    assert not hub.uploads and not hub.objects and list(hub.repos) == [REPO] and len(hub.repos[REPO].commits) == 1


def test_private_repository_is_hidden_from_strangers(hub, tmp_path):
    api = HfApi(token=TOKEN)
    for _ in range(2):
        api.create_repo(REPO, private=True, exist_ok=True)
    assert api.model_info(REPO).private
    upload(api, {'a.json': b'1'})
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info(REPO)
    hf_hub_download(REPO, 'a.json', cache_dir=tmp_path, token=TOKEN)


def test_repository_is_made_once(api):
    with pytest.raises(HfHubHTTPError, match='409'):
        api.create_repo(REPO)


def test_wrong_content_makes_no_commit(hub, api):
    def send(path, body, method='POST'):
        request = urllib.request.Request(
            hub.endpoint + path, body, {'Authorization': f'Bearer {TOKEN}'}, method=method)
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(request)
        return refusal.value.code

    oid = '0' * 64
    assert send(f'/lfs/{oid}', WEIGHTS, 'PUT') == 400
    assert send(f'/lfs/{oid}/verify', b'{"size": 3}') == 404
    lines = [
        {'key': 'header', 'value': {'summary': 'x'}},
        {'key': 'file', 'value': {'path': 'a.json', 'content': 'MQ=='}},
        {'key': 'lfsFile', 'value': {'path': 'a.safetensors', 'oid': oid, 'size': 3}},
    ]
    assert send(f'/api/models/{REPO}/commit/main', b'\n'.join(json.dumps(line).encode() for line in lines)) == 400
    assert len(hub.repos[REPO].commits) == 1 and not hub.uploads and not hub.objects


# faults of downloads

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

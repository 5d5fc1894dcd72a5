"""A small Hugging Face Hub on 127.0.0.1, as much of it as the real client needs to download and to upload models.

Uploads go the way of plain LFS: the client asks how to send each file (preupload), asks where to (LFS batch), sends it
there (PUT, verify), and at last makes a commit of all. `Hub.faults` holds what shall go wrong.
"""
import base64
import hashlib
import json
import re
from typing import NamedTuple
from urllib.parse import unquote

from support.http_server import Answer, Refusal, Request, Server, as_json
from support.http_server import Fault as Fault

Files = dict[str, bytes]
TOKEN = 'hf_token_of_the_tests'
REPO = r'(?P<repo>[^/]+/[^/]+?)'
REVISION = r'(?P<revision>[^/]+)'  # quoted, so that it has no slash
ROUTES = (
    ('GET', f'/{REPO}/resolve/{REVISION}/(?P<name>.+)', 'resolve'),
    ('GET', f'/api/models/{REPO}(?:/revision/{REVISION})?', 'model_info'),
    ('GET', f'/api/models/{REPO}/tree/{REVISION}', 'tree'),
    ('POST', '/api/repos/create', 'create_repo'),
    ('POST', '/api/validate-yaml', 'validate_yaml'),
    ('POST', f'/api/models/{REPO}/branch/{REVISION}', 'create_branch'),
    ('POST', f'/api/models/{REPO}/preupload/{REVISION}', 'preupload'),
    ('POST', f'/{REPO}[.]git/info/lfs/objects/batch', 'lfs_batch'),
    ('PUT', '/lfs/(?P<oid>[0-9a-f]{64})', 'lfs_put'),
    ('POST', '/lfs/(?P<oid>[0-9a-f]{64})/verify', 'lfs_verify'),
    ('POST', f'/api/models/{REPO}/commit/{REVISION}', 'receive_commit'),
)


class Commit(NamedTuple):
    message: str
    files: Files  # all of that revision


class Repo:
    """Commits by hash in the order of their making, and the last hash of each branch."""

    def __init__(self, private: bool = False) -> None:
        self.private = private
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}


class Hub(Server):
    """Repositories by name. Reading is free unless a repository is private, writing needs `TOKEN`.

    Attributes:
        repos: Repositories by name.
        downloads: (repo, file) of each GET that was answered with a file.
        uploads: (repo, file) of each file that came with an accepted commit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Forget all that was stored, recorded and asked for."""
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS
        self.faults.clear()
        self.downloads: list[tuple[str, str]] = []
        self.uploads: list[tuple[str, str]] = []

    def commit(self, repo: str, files: Files, branch: str = 'main', message: str = '') -> str:
        """Add a commit of just these files, to a new repository if there is none, and return its hash."""
        stored = self.repos.setdefault(repo, Repo())
        revision = hashlib.sha1(f'{repo} {len(stored.commits)}'.encode()).hexdigest()
        stored.commits[revision] = Commit(message, dict(files))
        stored.branches[branch] = revision
        return revision

    def files(self, repo: str, revision: str = 'main') -> Files:
        stored = self.repos[repo]
        return stored.commits[stored.branches.get(revision, revision)].files

    def respond(self, request: Request) -> Answer:
        method = 'GET' if request.method == 'HEAD' else request.method
        if method == 'POST' and not authorized(request):
            raise Refusal(401, message='Invalid username or password.')
        for route_method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match and method == route_method:
                groups = {key: unquote(value) for key, value in match.groupdict(default='main').items()}
                return getattr(self, name)(request, **groups)
        raise Refusal(404, 'RepoNotFound')  # such as one without an owner

    def find(self, request: Request, repo: str, revision: str) -> tuple[str, Files]:
        """Hash and files of a revision, if the request may see them."""
        stored = self.repos.get(repo)
        if stored is None:
            raise Refusal(404, 'RepoNotFound')
        if stored.private and not authorized(request):
            raise Refusal(401, 'RepoNotFound')
        revision = stored.branches.get(revision, revision)
        if revision not in stored.commits:
            raise Refusal(404, 'RevisionNotFound')
        return revision, stored.commits[revision].files

    # reading

    def resolve(self, request: Request, repo: str, revision: str, name: str) -> Answer:
        revision, files = self.find(request, repo, revision)
        if name not in files:
            raise Refusal(404, 'EntryNotFound', **{'X-Repo-Commit': revision})
        content = files[name]
        headers = {
            'X-Repo-Commit': revision,
            'ETag': f'"{hashlib.sha256(content).hexdigest()}"',
            'X-Linked-Size': str(len(content)),
        }
        match = re.fullmatch(r'bytes=(\d+)-(\d*)', request.headers.get('Range', ''))
        start = int(match[1]) if match else 0
        if match and start >= len(content):
            raise Refusal(416, **{'Content-Range': f'bytes */{len(content)}'})
        if request.method == 'GET':
            self.downloads.append((repo, name))
        if not match:
            return Answer(200, content, headers)
        part = content[start:int(match[2]) + 1 if match[2] else None]
        return Answer(206, part, {**headers, 'Content-Range': f'bytes {start}-{start + len(part) - 1}/{len(content)}'})

    def model_info(self, request: Request, repo: str, revision: str) -> Answer:
        revision, files = self.find(request, repo, revision)
        siblings = [{'rfilename': name} for name in files]
        return as_json({
            'id': repo, 'modelId': repo, 'private': self.repos[repo].private, 'sha': revision, 'siblings': siblings,
            'downloads': 0, 'likes': 0, 'tags': [], 'spaces': []})

    def tree(self, request: Request, repo: str, revision: str) -> Answer:
        _, files = self.find(request, repo, revision)
        return as_json([
            {'type': 'file', 'path': name, 'size': len(content), 'oid': git_hash(content)}
            for name, content in files.items()])

    # writing

    def create_repo(self, request: Request) -> Answer:
        wanted = json.loads(request.body)
        repo = f'{wanted["organization"]}/{wanted["name"]}'
        url = f'{self.endpoint}/{repo}'
        if repo in self.repos:
            return as_json({'error': 'You already created this model repo', 'url': url}, 409)
        private = wanted.get('private', False) or wanted.get('visibility') == 'private'  # old and new clients
        self.repos[repo] = Repo(private)
        self.commit(repo, {'.gitattributes': b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n'})
        return as_json({'url': url})

    def create_branch(self, request: Request, repo: str, revision: str) -> Answer:
        start, _ = self.find(request, repo, json.loads(request.body).get('startingPoint', 'main'))
        branches = self.repos[repo].branches
        if revision in branches:
            raise Refusal(409, message='Reference already exists')
        branches[revision] = start
        return as_json({})

    def validate_yaml(self, request: Request) -> Answer:
        return as_json({'errors': [], 'warnings': []})

    def preupload(self, request: Request, repo: str, revision: str) -> Answer:
        _, files = self.find(request, repo, revision)
        answers = []
        for file in json.loads(request.body)['files']:
            lfs = is_lfs(file['path'])
            answers.append({'path': file['path'], 'uploadMode': 'lfs' if lfs else 'regular', 'shouldIgnore': False})
            if file['path'] in files:
                content = files[file['path']]
                answers[-1]['oid'] = hashlib.sha256(content).hexdigest() if lfs else git_hash(content)
        return as_json({'files': answers})

    def lfs_batch(self, request: Request, repo: str) -> Answer:
        self.find(request, repo, 'main')
        answers = []
        for wanted in json.loads(request.body)['objects']:
            url = f'{self.endpoint}/lfs/{wanted["oid"]}'
            actions = {'upload': {'href': url}, 'verify': {'href': f'{url}/verify'}}
            answers.append(wanted if wanted['oid'] in self.objects else {**wanted, 'actions': actions})
        return as_json({'transfer': 'basic', 'objects': answers})

    def lfs_put(self, request: Request, oid: str) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(400, message='The content has another hash')
        self.objects[oid] = request.body
        return Answer(200)

    def lfs_verify(self, request: Request, oid: str) -> Answer:
        if len(self.objects.get(oid, b'')) != json.loads(request.body)['size']:
            raise Refusal(404, message='There is no such object of this size')
        return as_json({})

    def receive_commit(self, request: Request, repo: str, revision: str) -> Answer:
        """Make a commit of the last one's files with all changes of the request, or none if one is wrong."""
        _, files = self.find(request, repo, revision)
        if revision not in self.repos[repo].branches:
            raise Refusal(400, message='A commit needs a branch')
        files, message, changed = dict(files), '', []
        for line in request.body.splitlines():
            key, value = (item := json.loads(line))['key'], item['value']
            if key == 'header':
                message = value['summary']
            elif key == 'file' and not is_lfs(value['path']):
                files[value['path']] = base64.b64decode(value['content'])
                changed.append((repo, value['path']))
            elif key == 'lfsFile' and len(self.objects.get(value['oid'], b'')) == value['size']:
                files[value['path']] = self.objects[value['oid']]
                changed.append((repo, value['path']))
            else:
                raise Refusal(400, message=f'This cannot be committed: {key}')
        oid = self.commit(repo, files, revision, message)
        self.uploads += changed
        return as_json({'success': True, 'commitOid': oid, 'commitUrl': f'{self.endpoint}/{repo}/commit/{oid}'})


def authorized(request: Request) -> bool:
    return request.headers.get('Authorization') == f'Bearer {TOKEN}'


def is_lfs(name: str) -> bool:
    return name.endswith(('.safetensors', '.bin', '.pt', '.pth'))


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()

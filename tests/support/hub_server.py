"""A small Hugging Face Hub on 127.0.0.1, as much of it as the real client needs to download models."""
import hashlib
import re
from typing import NamedTuple
from urllib.parse import unquote

from support.http_server import Answer, Refusal, Request, Server, part_of
from support.http_server import Fault as Fault

Files = dict[str, bytes]


class Repo(NamedTuple):
    """Files of each revision by its hash, in the order of their making, and the last hash of each branch."""
    commits: dict[str, Files]
    branches: dict[str, str]


class Hub(Server):
    """Repositories by name. `faults` holds what shall go wrong.

    Attributes:
        repos: Repositories by name.
        downloads: (repo, file) of each GET that was answered with a file.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Forget all that was stored, recorded and asked for."""
        self.repos: dict[str, Repo] = {}
        self.faults.clear()
        self.downloads: list[tuple[str, str]] = []

    def commit(self, repo: str, files: Files, branch: str = 'main') -> str:
        """Add a commit of just these files, to a new repository if there is none, and return its hash."""
        stored = self.repos.setdefault(repo, Repo({}, {}))
        revision = hashlib.sha1(f'{repo} {len(stored.commits)}'.encode()).hexdigest()
        stored.commits[revision] = dict(files)
        stored.branches[branch] = revision
        return revision

    def respond(self, request: Request) -> Answer:
        match = re.fullmatch(r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', request.path)
        if match is None or request.method not in ('GET', 'HEAD'):
            raise Refusal(404, 'RepoNotFound')  # such as one without an owner
        repo, revision, name = map(unquote, match.groups())
        if repo not in self.repos:
            raise Refusal(404, 'RepoNotFound')
        stored = self.repos[repo]
        revision = stored.branches.get(revision, revision)
        if revision not in stored.commits:
            raise Refusal(404, 'RevisionNotFound')
        if name not in stored.commits[revision]:
            raise Refusal(404, 'EntryNotFound', **{'X-Repo-Commit': revision})
        content = stored.commits[revision][name]
        if request.method == 'GET':
            self.downloads.append((repo, name))
        return part_of(content, request, {
            'X-Repo-Commit': revision,
            'ETag': f'"{hashlib.sha256(content).hexdigest()}"',
            'X-Linked-Size': str(len(content)),
        })

"""A small Hugging Face Hub on 127.0.0.1, as much of it as the real client needs to download files."""
import hashlib
import http.server
import re
import threading
from typing import Dict, List, Optional, Tuple

Files = Dict[str, bytes]


class Hub:
    """Repositories by name, each a list of commits; a commit is all files of that revision. `main` is the last one.

    Attributes:
        endpoint: Address for HF_ENDPOINT.
        downloads: (repo, file) of each GET that was answered with a file.
        truncate: Lose the connection after this many bytes of a file, None to send all.
    """

    def __init__(self) -> None:
        self.repos: Dict[str, List[Files]] = {}
        self.downloads: List[Tuple[str, str]] = []
        self.truncate: Optional[int] = None
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def do_HEAD(self) -> None:
                hub.answer(self, send_body=False)

            def do_GET(self) -> None:
                hub.answer(self, send_body=True)

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.endpoint = f'http://127.0.0.1:{self.server.server_port}'

    def commit(self, repo: str, files: Files) -> str:
        """Add a commit and return its hash."""
        self.repos.setdefault(repo, []).append(files)
        return self.commit_hash(repo, len(self.repos[repo]) - 1)

    @staticmethod
    def commit_hash(repo: str, index: int) -> str:
        return hashlib.sha1(f'{repo} {index}'.encode()).hexdigest()

    def answer(self, request: http.server.BaseHTTPRequestHandler, send_body: bool) -> None:
        parts = request.path.split('?')[0].strip('/').split('/')
        repo = '/'.join(parts[:2])
        if repo not in self.repos or len(parts) < 5 or parts[2] != 'resolve':
            return self.refuse(request, 'RepoNotFound')
        hashes = [self.commit_hash(repo, i) for i in range(len(self.repos[repo]))]
        revision = hashes[-1] if parts[3] == 'main' else parts[3]
        if revision not in hashes:
            return self.refuse(request, 'RevisionNotFound')
        name = '/'.join(parts[4:])
        content = self.repos[repo][hashes.index(revision)].get(name)
        if content is None:
            return self.refuse(request, 'EntryNotFound', revision)
        match = re.fullmatch(r'bytes=(\d+)-(\d*)', request.headers.get('Range', ''))
        start = int(match[1]) if match else 0
        end = int(match[2]) + 1 if match and match[2] else len(content)
        request.send_response(206 if match else 200)
        if match:
            request.send_header('Content-Range', f'bytes {start}-{end - 1}/{len(content)}')
        request.send_header('X-Repo-Commit', revision)
        request.send_header('ETag', f'"{hashlib.sha256(content).hexdigest()}"')
        request.send_header('Content-Length', str(end - start))
        request.end_headers()
        if send_body:
            self.downloads.append((repo, name))
            request.wfile.write(content[start:end if self.truncate is None else min(end, self.truncate)])
            request.close_connection = self.truncate is not None

    @staticmethod
    def refuse(request: http.server.BaseHTTPRequestHandler, code: str, revision: str = '') -> None:
        request.send_response(404)
        request.send_header('X-Error-Code', code)
        if revision:
            request.send_header('X-Repo-Commit', revision)
        request.send_header('Content-Length', '0')
        request.end_headers()

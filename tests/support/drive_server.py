"""A small Google Drive on 127.0.0.1 that has one public file under every id; gdown is led to it."""
import hashlib

import pytest
import requests

from support.http_server import Answer, Refusal, Request, Server, part_of
from support.http_server import Fault as Fault

QUOTA_PAGE = (
    b'<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body>'
    b'<p class="uc-error-caption">Sorry, you can&#39;t view or download this file at this time.</p>'
    b'<p class="uc-error-subcaption">Too many users have viewed it recently.</p></body></html>')


class Drive(Server):
    """Serves a file, or Drive's page instead of it.

    Attributes:
        content: The file.
        page: Sent for every request if not empty.
        starts: First byte of each request for the file.
    """

    def __init__(self, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.content, self.page = content, b''
        self.starts: list[str] = []
        real = requests.Session.request

        def request(session: requests.Session, method: str, url: str, **kwargs: object) -> requests.Response:
            return real(session, method, url.replace('https://drive.google.com', self.endpoint), **kwargs)

        monkeypatch.setattr(requests.Session, 'request', request)

    def respond(self, request: Request) -> Answer:
        if request.path != '/uc':
            raise Refusal(404)
        if self.page:
            return Answer(200, self.page, {'Content-Type': 'text/html'})
        self.starts.append(request.headers.get('Range', '0'))
        return part_of(self.content, request, {
            'Content-Type': 'application/octet-stream',
            'Content-Disposition': 'attachment; filename="w.pt"',
            'ETag': f'"{hashlib.md5(self.content).hexdigest()}"',
        })

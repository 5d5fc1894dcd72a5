"""An HTTP server on 127.0.0.1 for tests: it answers as its class says, and spoils the answers that it is told to."""
import dataclasses
import http.server
import json
import re
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

ELSEWHERE = '/elsewhere'  # in front of a path: the same again, for redirects


class Request(NamedTuple):
    """One request, without the query of its address."""
    method: str
    path: str
    headers: Mapping[str, str]


class Answer(NamedTuple):
    status: int
    body: bytes = b''
    headers: Mapping[str, str] = {}


class Refusal(Exception):
    """Ends the handling of a request with an error, in words that huggingface_hub's client understands."""

    def __init__(self, status: int, code: str = '', message: str = '', **headers: str) -> None:
        headers = {'X-Error-Code': code, 'X-Error-Message': message, **headers}
        body = json.dumps({'error': message or code}).encode()
        self.answer = Answer(status, body, {key: value for key, value in headers.items() if value})


def part_of(content: bytes, request: Request, headers: Mapping[str, str]) -> Answer:
    """The range of the content that was asked for, or all of it."""
    match = re.fullmatch(r'bytes=(\d+)-(\d*)', request.headers.get('Range', ''))
    if not match:
        return Answer(200, content, headers)
    start = int(match[1])
    if start >= len(content):
        raise Refusal(416, **{'Content-Range': f'bytes */{len(content)}'})
    part = content[start:int(match[2]) + 1 if match[2] else None]
    return Answer(206, part, {**headers, 'Content-Range': f'bytes {start}-{start + len(part) - 1}/{len(content)}'})


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong with one coming request; append it to `Server.faults`.

    `status`, `redirect` and `body` stand in for the right answer, and what was asked for is not done. The others change
    the way in which the answer is sent, after it was done.

    Attributes:
        method: Regular expression of the request's method; only such a request is hit.
        path: Regular expression to be found in the request's path; only such a request is hit.
        status: Answer with this status, and no body if none is given.
        redirect: 'absolute' or 'relative': answer 302 with an address of that kind, under which this server answers as
            it would have done here.
        body: Answer with this body, such as an HTML page, and status 200 if none is given.
        headers: Sent besides the answer's own, or in place of those of the same names.
        cut_after: Lose the connection after so many bytes of the body.
        pause_s: Wait so long after each kilobyte.
    """
    method: str = 'GET'
    path: str = ''
    status: int | None = None
    redirect: str | None = None
    body: bytes | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    cut_after: int | None = None
    pause_s: float = 0.


class Server:
    """Answers each request by `respond`, which a class of its own gives; one at a time, but sent side by side.

    Attributes:
        endpoint: Address of the server.
        faults: What goes wrong next: each hits the first request that it fits, and is then gone.
    """

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def do_GET(self) -> None:
                request = Request(self.command, urlsplit(self.path).path, self.headers)
                with server.lock:
                    fault = server.take_fault(request)
                    answer = server.answer(request, fault)
                send(self, answer, fault)

            do_HEAD = do_GET

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.endpoint = f'http://127.0.0.1:{self.server.server_port}'

    def take_fault(self, request: Request) -> Fault:
        for i, fault in enumerate(self.faults):
            if re.fullmatch(fault.method, request.method) and re.search(fault.path, request.path):
                return self.faults.pop(i)
        return Fault()

    def answer(self, request: Request, fault: Fault) -> Answer:
        request = request._replace(path=request.path.removeprefix(ELSEWHERE))
        if fault.status is not None or fault.body is not None:
            return Answer(fault.status or 200, fault.body or b'')
        try:
            if fault.redirect is None:
                return self.respond(request)
            headers = self.respond(request._replace(method='HEAD')).headers
        except Refusal as refusal:
            return refusal.answer
        host = self.endpoint if fault.redirect == 'absolute' else ''
        return Answer(302, b'', {**headers, 'Location': f'{host}{ELSEWHERE}{request.path}'})

    def respond(self, request: Request) -> Answer:
        raise NotImplementedError  # what is served is for the class of each server to say


def send(request: http.server.BaseHTTPRequestHandler, answer: Answer, fault: Fault) -> None:
    request.send_response(answer.status)
    headers = {**answer.headers, 'Content-Length': str(len(answer.body)), **fault.headers}
    for name, value in headers.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command == 'HEAD':
        return
    body = answer.body[:fault.cut_after]
    step = 1024 if fault.pause_s else max(1, len(body))
    for start in range(0, len(body), step):
        request.wfile.write(body[start:start + step])
        time.sleep(fault.pause_s)
    if fault.cut_after is not None:
        request.close_connection = True

"""A small Google Drive on 127.0.0.1: one public file, Drive's pages around it, and faults for coming requests."""
import dataclasses
import hashlib
import html
import http.server
import re
import socket
import struct
import threading
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

FILE_ID = '1Drive-File_Id'
UUID = '4d3b0b0e-aaaa'
STEP_BYTES = 1 << 14
QUOTA_PAGE = (
    b'<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title><style>p {}</style></head><body><div>'
    b'<p class="uc-error-caption">Sorry, you can&#39;t view or download this file at this time.</p>'
    b'<p class="uc-error-subcaption">Too many users have viewed it recently.</p></div></body></html>')


def warning_page(action: str) -> bytes:
    """What Drive shows before a file that is too large for its virus scan."""
    inputs = {'id': FILE_ID, 'export': 'download', 'confirm': 't', 'uuid': UUID}
    fields = ''.join(f'<input type="hidden" name="{name}" value="{value}">' for name, value in inputs.items())
    page = (
        '<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>'
        '<form id="search" action="/search" method="get"><input name="q" value="no"></form>'
        f'<form id="download-form" action="{html.escape(action)}" method="get">'
        f'<input type="submit" value="Download anyway"/>{fields}</form></body></html>')
    return page.encode()


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong with one request.

    Attributes:
        status: Answer with this status and no body.
        headers: Sent besides the answer's own, or in place of those of the same names; None leaves one out.
        body: Answer 200 with this.
        cut_at: Lose the connection at this byte of the file.
        reset: Lose it by a reset, not by an end.
        stall_at: Send nothing more from this byte of the file on, and keep the connection.
        pause_s: Wait so long after each `STEP_BYTES`.
    """
    status: int | None = None
    headers: dict[str, str | None] = dataclasses.field(default_factory=dict)
    body: bytes | None = None
    cut_at: int | None = None
    reset: bool = False
    stall_at: int | None = None
    pause_s: float = 0.


class Asked(NamedTuple):
    query: dict[str, str]
    start: str | None  # of the Range header
    if_range: str | None


class Drive:
    """Serves `content` to those who ask for `FILE_ID`.

    Attributes:
        endpoint: Address for `drive.ENDPOINT`.
        content: The file; its ETag follows from it.
        faults: What goes wrong with the next requests, in their order.
        always: What goes wrong with those after them.
        ranges: Whether Range is heeded.
        if_range: Whether If-Range is heeded.
        etag, last_modified: Whether these headers are sent.
        length: Whether the length of the file is told.
        warning: Whether a page comes first whose form must be sent.
        asked: The requests.
        num_sent: Bytes of the file that were sent, all requests together.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.faults: list[Fault] = []
        self.always = Fault()
        self.ranges = self.if_range = self.etag = self.last_modified = self.length = True
        self.warning = False
        self.asked: list[Asked] = []
        self.num_sent = 0
        self.closing = threading.Event()
        drive = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def do_GET(self) -> None:
                self.close_connection = True
                try:
                    drive.answer(self)
                except ConnectionError:  # the client was killed
                    pass

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(.02,), daemon=True).start()
        self.address = f'http://127.0.0.1:{self.server.server_port}'
        self.endpoint = f'{self.address}/download'

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        url = urlsplit(request.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        match = re.fullmatch(r'bytes=(\d+)-', request.headers.get('Range', ''))
        asked = Asked(query, match[1] if match else None, request.headers.get('If-Range'))
        self.asked.append(asked)
        fault = self.faults.pop(0) if self.faults else self.always
        if fault.status is not None or fault.body is not None:
            body = fault.body or b''
            send_head(request, fault.status or 200, {'Content-Length': str(len(body)), **fault.headers})
            request.wfile.write(body)
        elif url.path != '/download' or query.get('id') != FILE_ID:
            send_head(request, 404, {'Content-Length': '0'})
        elif self.warning and query.get('uuid') != UUID:
            page = warning_page(self.endpoint)
            send_head(request, 200, {'Content-Type': 'text/html; charset=utf-8', 'Content-Length': str(len(page))})
            request.wfile.write(page)
        else:
            self.send_file(request, asked, fault)

    def send_file(self, request: http.server.BaseHTTPRequestHandler, asked: Asked, fault: Fault) -> None:
        content, start, status = self.content, 0, 200
        headers: dict[str, str | None] = {'Content-Type': 'application/octet-stream'}
        if self.etag:
            headers['ETag'] = f'"{hashlib.md5(content).hexdigest()}"'
        if self.last_modified:
            headers['Last-Modified'] = 'Mon, 01 Jan 2024 00:00:00 GMT'
        validators = (None, headers.get('ETag'), headers.get('Last-Modified'))
        if asked.start and self.ranges and (not self.if_range or asked.if_range in validators):
            start, status = int(asked.start), 206
            headers['Content-Range'] = f'bytes {start}-{len(content) - 1}/{len(content)}'
            if start >= len(content):
                return send_head(request, 416, {'Content-Range': f'bytes */{len(content)}', 'Content-Length': '0'})
        if self.length:
            headers['Content-Length'] = str(len(content) - start)
        send_head(request, status, {**headers, **fault.headers})
        self.send_body(request, content, start, fault)

    def send_body(
            self, request: http.server.BaseHTTPRequestHandler, content: bytes, start: int, fault: Fault,
    ) -> None:
        end = min(limit for limit in (len(content), fault.cut_at, fault.stall_at) if limit is not None)
        for position in range(start, end, STEP_BYTES):
            chunk = content[position:min(position + STEP_BYTES, end)]
            request.wfile.write(chunk)
            self.num_sent += len(chunk)
            if fault.pause_s:
                self.closing.wait(fault.pause_s)
        if fault.stall_at is not None:
            self.closing.wait()
        if fault.reset:
            self.closing.wait(.05)  # a reset would take along what the client has not read yet
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            request.connection.close()


def send_head(
        request: http.server.BaseHTTPRequestHandler, status: int, headers: dict[str, str | None],
) -> None:
    request.send_response(status)
    for name, value in {**headers, 'Connection': 'close'}.items():
        if value is not None:
            request.send_header(name, value)
    request.end_headers()

"""A web server on loopback that gives ranges of files as it should, or does not, and counts what it gives. Threads of the test."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.support.web_pace import Pace


@dataclass
class WebFile:
    """One file: its bytes now, and how it is served."""

    data: bytes
    ranges: bool = True
    etag: bool = True
    length: bool = True
    mtime: float = 1_700_000_000
    headers: dict[str, str] = field(default_factory=dict)
    authorization: str = ""
    """What must be sent to get it."""
    redirect: str = ""
    fixed_tag: str = ""
    """An ETag that stays the same whatever the bytes: a server that lies."""

    @property
    def tag(self) -> str:
        """A strong ETag of the bytes."""
        return self.fixed_tag or f'"{hashlib.sha256(self.data).hexdigest()[:32]}"'


@dataclass
class Web:
    """The server: what it has, what it was asked."""

    port: int = 0
    files: dict[str, WebFile] = field(default_factory=dict)
    bytes_sent: int = 0
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    pace: Pace = field(default_factory=Pace)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def url(self, path: str) -> str:
        """The address of a file."""
        return f"http://127.0.0.1:{self.port}{path}"


def _handler(web: Web) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            file = web.files.get(path)
            headers = {name.lower(): value for name, value in self.headers.items()}
            with web.lock:
                web.requests.append((self.path, headers))
            if file is None:
                return self._empty(404)
            if file.redirect:
                return self._empty(302, {"Location": file.redirect})
            if file.authorization and headers.get("authorization") != file.authorization:
                return self._empty(401)
            self._give(file, headers)
            return None

        def _empty(self, status: int, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": "0", **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()

        def _give(self, file: WebFile, headers: dict[str, str]) -> None:
            data, first, last = file.data, 0, len(file.data) - 1
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", ""))
            same = headers.get("if-range") in {None, file.tag if file.etag else formatdate(file.mtime, usegmt=True)}
            partial = bool(file.ranges and match and same)
            if partial and match:
                first, last = int(match[1]), min(int(match[2]), last)
            if partial and first > last:
                return self._empty(416, {"Content-Range": f"bytes */{len(data)}"})
            self.send_response(206 if partial else 200)
            if partial:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            if file.length:
                self.send_header("Content-Length", str(last + 1 - first))
            else:
                self.send_header("Transfer-Encoding", "chunked")
            if file.etag:
                self.send_header("ETag", file.tag)
            self.send_header("Last-Modified", formatdate(file.mtime, usegmt=True))
            for name, value in file.headers.items():
                self.send_header(name, value)
            self.end_headers()
            for start in range(first, last + 1, 64 << 10):
                piece = data[start : min(start + (64 << 10), last + 1)]
                web.pace.wait(len(piece))
                try:
                    self.wfile.write(piece if file.length else b"%x\r\n%s\r\n" % (len(piece), piece))
                except OSError:
                    self.close_connection = True
                    return None
                with web.lock:
                    web.bytes_sent += len(piece)
            if not file.length:
                self.wfile.write(b"0\r\n\r\n")
            return None

    return Handler


@contextmanager
def running_web() -> Iterator[Web]:
    """Serve until the end of the block."""
    web = Web()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(web))
    server.daemon_threads = True
    server.block_on_close = False
    web.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield web
    finally:
        web.pace.end()
        server.shutdown()
        server.server_close()
        thread.join(10)

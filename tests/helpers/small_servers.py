"""Servers that refuse: HTTP and RTSP with statuses and credentials, and ports without one."""

import base64
import hashlib
import http.server
import re
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

USER, PASSWORD = "anna", "s:e/c ret"
REALM, NONCE = "cameras", "0a1b2c"

Auth = Literal["none", "basic", "digest"]


def is_allowed(header: str | None, auth: Auth, method: str) -> bool:
    """Return whether an Authorization header is the right one; by RFC 7617 and RFC 2617."""
    if auth == "none":
        return True
    if header is None:
        return False
    if auth == "basic":
        return header == "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    fields = dict(re.findall(r'(\w+)="?([^",]*)"?', header.removeprefix("Digest ")))

    def md5(text: str) -> str:
        return hashlib.md5(text.encode()).hexdigest()

    secret = md5(f"{USER}:{REALM}:{PASSWORD}")
    expected = md5(f"{secret}:{NONCE}:{md5(method + ':' + fields.get('uri', ''))}")
    return fields.get("username") == USER and fields.get("response") == expected


def challenge(auth: Auth) -> str:
    if auth == "basic":
        return f'Basic realm="{REALM}"'
    return f'Digest realm="{REALM}", nonce="{NONCE}"'


@contextmanager
def served(server: socketserver.BaseServer) -> Iterator[int]:
    """Run a server in a thread and give its port."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def rtsp_server(status: str = "200 OK", auth: Auth = "none", more: str = "") -> Iterator[int]:
    """Answer every request with a status, once the credentials are right; ``more`` is offered."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while line := self.rfile.readline().decode().strip():
                headers = {}
                while header := self.rfile.readline().decode().strip():
                    name, _, value = header.partition(": ")
                    headers[name.lower()] = value
                said, asks = status, ""
                if not is_allowed(headers.get("authorization"), auth, line.split()[0]):
                    said = "401 Unauthorized"
                    asks = f"{more}WWW-Authenticate: {challenge(auth)}\r\n"
                number = headers.get("cseq", "1")
                self.wfile.write(f"RTSP/1.0 {said}\r\nCSeq: {number}\r\n{asks}\r\n".encode())

    with served(_Threaded(("127.0.0.1", 0), Handler)) as port:
        yield port


class _Threaded(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False


@contextmanager
def http_server(status: int = 200, auth: Auth = "none", kind: str = "video/mp4") -> Iterator[int]:
    """Answer every request with a status and a few bytes, once the credentials are right."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = is_allowed(self.headers.get("Authorization"), auth, "GET")
            self.send_response(status if allowed else 401)
            if not allowed:
                self.send_header("WWW-Authenticate", challenge(auth))
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"none")

        def log_message(self, *arguments: object) -> None:
            pass

    with served(_Threaded(("127.0.0.1", 0), Handler)) as port:
        yield port


@contextmanager
def other_server(answer: bytes) -> Iterator[int]:
    """Answer every connection with the same bytes, and close it."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(4096)
            self.request.sendall(answer)
            # Closed with a part of the request unread, the connection would be reset, and what the
            # other side has not read yet be lost.
            self.request.settimeout(10)
            with suppress(OSError):
                self.request.shutdown(socket.SHUT_WR)
                while self.request.recv(4096):
                    pass

    with served(_Threaded(("127.0.0.1", 0), Handler)) as port:
        yield port


@contextmanager
def dripping_server(start: bytes) -> Iterator[tuple[int, threading.Event]]:
    """Answer with a start, then a byte now and then for 20 s; the event says that it was cut off.

    No pause is long enough for a time limit that counts from one byte to the next.
    """
    cut = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(4096)
            try:
                self.request.sendall(start)
                for _ in range(1000):
                    self.request.sendall(b"x")
                    time.sleep(0.02)
            except OSError:
                cut.set()

    with served(_Threaded(("127.0.0.1", 0), Handler)) as port:
        yield port, cut


@contextmanager
def no_server() -> Iterator[int]:
    """Give a port that refuses connections: it is bound, and not listened at."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]

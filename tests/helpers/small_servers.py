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
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Literal

USER, PASSWORD = "anna", "s:e/c ret"
REALM, NONCE = "cameras", "0a1b2c"

Auth = Literal["none", "basic", "digest"]


def is_allowed(
    header: str | None,
    auth: Auth,
    method: str,
    login: tuple[str, str] = (USER, PASSWORD),
    realm: str = REALM,
    nonce: str = NONCE,
) -> bool:
    """Return whether an Authorization header is the right one; by RFC 7617 and RFC 2617."""
    user, password = login
    if auth == "none" or header is None:
        return auth == "none"
    if auth == "basic":
        return header == "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    fields = dict(re.findall(r'(\w+)="?([^",]*)"?', header.removeprefix("Digest ")))

    def md5(text: str) -> str:
        return hashlib.md5(text.encode()).hexdigest()

    secret = md5(f"{user}:{realm}:{password}")
    expected = md5(f"{secret}:{nonce}:{md5(method + ':' + fields.get('uri', ''))}")
    return fields.get("username") == user and fields.get("response") == expected


def challenge(auth: Auth) -> str:
    if auth == "basic":
        return f'Basic realm="{REALM}"'
    return f'Digest realm="{REALM}", nonce="{NONCE}"'


class Threaded(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False


class HttpHandler(http.server.BaseHTTPRequestHandler):
    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def answer(self, status: int, content: bytes = b"", *fields: tuple[str, str]) -> None:
        """Send an answer with these header fields and a length."""
        self.send_response(status)
        for name, value in (*fields, ("Content-Length", str(len(content)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


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


def handled(
    handler: type[socketserver.BaseRequestHandler], host: str = "127.0.0.1"
) -> AbstractContextManager[int]:
    return served(Threaded((host, 0), handler))


def rtsp_server(
    status: str = "200 OK", auth: Auth = "none", more: str = ""
) -> AbstractContextManager[int]:
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

    return handled(Handler)


def http_server(
    status: int = 200, auth: Auth = "none", kind: str = "video/mp4"
) -> AbstractContextManager[int]:
    """Answer every request with a status and a few bytes, once the credentials are right."""

    class Handler(HttpHandler):
        def do_GET(self) -> None:
            fields = [("Content-Type", kind)]
            if is_allowed(self.headers.get("Authorization"), auth, "GET"):
                self.answer(status, b"none", *fields)
            else:
                self.answer(401, b"none", *fields, ("WWW-Authenticate", challenge(auth)))

    return handled(Handler)


def other_server(answer: bytes) -> AbstractContextManager[int]:
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

    return handled(Handler)


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

    with handled(Handler) as port:
        yield port, cut


@contextmanager
def no_server() -> Iterator[int]:
    """Give a port that refuses connections: it is bound, and not listened at."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]

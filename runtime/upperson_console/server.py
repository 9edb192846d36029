"""The server: TLS, the listening socket, and a thread that runs uvicorn."""

import errno
import logging
import os
import socket
import ssl
import threading
from collections.abc import Iterable
from pathlib import Path

import uvicorn
from anyio import to_thread

from upperson_console.accounts import Access
from upperson_console.app import make_app
from upperson_console.connections import Connection, Loop, log_seldom
from upperson_console.live import Live
from upperson_console.service import ConsoleService
from upperson_rt.errors import InputError
from upperson_rt.machine import limit_heap

# --- TLS

_CIPHERS = "@SECLEVEL=2:ECDHE+AESGCM:ECDHE+CHACHA20"
"""Of TLS 1.2, with forward secrecy as those of 1.3."""
_LONGEST_PEM_BYTES = 1 << 20
_REFUSED = {
    "MISMATCH": "the key is not that of the certificate",
    "KEY_TOO_SMALL": "the key is too short; of RSA take 2,048 bits or more",
    "MD_TOO_WEAK": "the certificate is signed by a hash that is broken; take SHA-256",
}
"""OpenSSL's reasons, and what they mean."""


def tls_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Return a TLS context: 1.2 or newer, ciphers with forward secrecy."""

    def encrypted() -> str:
        raise InputError(
            f"{key} is encrypted, which a server cannot use: store it without a password, readable "
            "by this user alone, with  openssl pkey -in KEY -out PLAIN_KEY",
            code="tls_key_encrypted",
            path=key,
        )

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    try:
        context.load_cert_chain(certificate, key, encrypted)
    except OSError as error:
        _check_pem("--tls-cert", certificate, "a certificate", b"CERTIFICATE-----")
        _check_pem("--tls-key", key, "a private key", b"PRIVATE KEY-----")
        found = (error.reason if isinstance(error, ssl.SSLError) else error.strerror) or ""
        known = next((text for name, text in _REFUSED.items() if name in found), None)
        why = known or found.replace("_", " ").lower() or "one of them is damaged"
        raise InputError(
            f"--tls-cert {certificate} and --tls-key {key} cannot be used: {why}",
            code="tls_unusable",
            reason=why,
        ) from error
    return context


def _check_pem(option: str, file: Path, what: str, mark: bytes) -> None:
    """Raise InputError for a file that cannot be read or is no PEM, which OpenSSL does not name.

    A pipe is not read again: OpenSSL has read it already.
    """
    try:
        if file.exists() and not file.is_file() and not file.is_dir():
            return
        with open(file, "rb") as opened:
            content = opened.read(_LONGEST_PEM_BYTES)
    except OSError as error:
        raise InputError(
            f"{option} {file} cannot be read: {error.strerror}",
            code="tls_file_unreadable",
            option=option,
            path=file,
        ) from error
    if mark not in content:
        raise InputError(
            f"{option} {file} holds no {what.partition(' ')[2]}: expected {what} in PEM, a text "
            "that begins with  -----BEGIN",
            code="tls_file_not_pem",
            option=option,
            path=file,
        )


# --- The server


_END_WITHIN_S = 4
"""Grace period for running requests when the server ends."""
_THREADS = 12
"""Worker threads, each with a heap and a connection to the gallery. They outnumber the
encoder's queue (`limits`), so that pictures are sent while it is full."""
_LARGEST_IN_HEAP = 1 << 20
"""Larger blocks, such as those of a growing search index, are returned to the system."""


def listening(host: str, port: int) -> socket.socket:
    """Return a listening socket; raises InputError if the address or port cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        place = socket.create_server((host, port), family=family, backlog=128)
        # Inherited by connections. Without it a response's body waits 40 ms for the acknowledgement
        # of its head; asyncio sets it only on sockets that it makes.
        place.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return place
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if number and number > 0 else str(error)
        hint = "; choose another with  --port" if number == errno.EADDRINUSE else ""
        raise InputError(
            f"cannot listen at {host} port {port}: {reason}{hint}",
            code="cannot_listen",
            host=host,
            port=port,
        ) from error


class Server:
    """A console that serves in a thread of its own, from `start` until `end`."""

    def __init__(
        self,
        service: ConsoleService,
        access: Access,
        place: socket.socket,
        names: Iterable[str] = (),
        live: Live | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Prepare to serve at a socket of `listening`, which the caller closes."""
        self._place = place
        self._live = live or Live(())
        log_seldom("uvicorn.error")
        config = uvicorn.Config(
            make_app(service, access, names, self._live),
            log_config=None,
            log_level=logging.WARNING,
            access_log=False,
            server_header=False,
            http=Connection,
            timeout_graceful_shutdown=_END_WITHIN_S,
            timeout_keep_alive=15,
        )
        config.load()
        config.ssl = tls
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="console", daemon=True)
        host, port = place.getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        self.url = f"{'http' if tls is None else 'https'}://{name}:{port}/"
        """Its address."""

    def start(self) -> None:
        """Begin to serve; from now on large free blocks return to the system."""
        limit_heap(_LARGEST_IN_HEAP)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end of the thread; return whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def end(self) -> None:
        """Answer the running requests, and end."""
        self._live.has_ended = True
        self._server.should_exit = True
        self._thread.join()

    def _run(self) -> None:
        loop = Loop()
        try:
            loop.run_until_complete(self._serve())
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    async def _serve(self) -> None:
        to_thread.current_default_thread_limiter().total_tokens = _THREADS
        await self._server.serve(sockets=[self._place])

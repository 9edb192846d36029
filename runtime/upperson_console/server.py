"""The server process: opens everything, listens, and ends without losing anything."""

import errno
import logging
import os
import socket
import ssl
import stat
import threading
from collections.abc import Iterable
from pathlib import Path

import uvicorn
from anyio import to_thread

from upperson_console.accounts import Access
from upperson_console.app import make_app
from upperson_console.connections import Connection, Loop, log_seldom
from upperson_console.desk import Desk
from upperson_console.live import Live
from upperson_console.onvif.routes import OnvifRoutes
from upperson_rt.errors import InputError
from upperson_rt.machine import keep_little

__all__ = [
    "Server",
    "listening",
    "tls_context",
]

# --- TLS

_CIPHERS = "@SECLEVEL=2:ECDHE+AESGCM:ECDHE+CHACHA20"
"""Of TLS 1.2; those of 1.3 are of this kind: what was read today stays secret if the private key is
lost later."""
_LONGEST_PEM_BYTES = 1 << 20
_REFUSED = {
    "MISMATCH": "the key is not that of the certificate",
    "KEY_TOO_SMALL": "the key is too short; of RSA take 2,048 bits or more",
    "MD_TOO_WEAK": "the certificate is signed by a hash that is broken; take SHA-256",
}
"""What OpenSSL says, and what it means."""


def tls_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Return what TLS is spoken with: 1.2 or newer, with keys that do not outlive a connection.

    Raises:
        InputError: Certificate or key cannot be used, or are too weak.
    """

    def encrypted() -> str:
        raise InputError(
            f"{key} is encrypted, and nobody is there to enter its password: store it without, for "
            "this user alone, with  openssl pkey -in KEY -out PLAIN_KEY"
        )

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    try:
        context.load_cert_chain(certificate, key, encrypted)
    except OSError as error:
        _check_pem(f"--tls-cert {certificate}", certificate, "a certificate", b"CERTIFICATE-----")
        _check_pem(f"--tls-key {key}", key, "a private key", b"PRIVATE KEY-----")
        found = (error.reason if isinstance(error, ssl.SSLError) else error.strerror) or ""
        told = next((text for name, text in _REFUSED.items() if name in found), None)
        why = told or found.replace("_", " ").lower() or "one of them is damaged"
        raise InputError(
            f"--tls-cert {certificate} and --tls-key {key} cannot be used: {why}"
        ) from error
    return context


def _check_pem(given: str, file: Path, what: str, mark: bytes) -> None:
    """Say what OpenSSL does not: which of the files it is, and what stands in it.

    What can be read once only, as a pipe of the shell, gave OpenSSL what it had and is left alone.
    """
    try:
        kind = file.stat().st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            return
        with open(file, "rb") as opened:
            content = opened.read(_LONGEST_PEM_BYTES)
    except OSError as error:
        raise InputError(f"{given} cannot be read: {error.strerror}") from error
    if mark not in content:
        raise InputError(
            f"{given} holds no {what.partition(' ')[2]}: expected {what} in PEM, a text that "
            "begins with  -----BEGIN"
        )


# --- The server process: opens everything, listens, and ends without losing anything


_END_WITHIN_S = 4
"""What is being answered may take so long when the server ends."""
_THREADS = 12
"""Work on requests at a time; others wait for their turn. More would hold more memory (a heap and a
connection to the gallery each) and be no quicker. More than wait for the encoder, see `turns`, so
that pictures are shown meanwhile."""
_LARGEST_IN_HEAP = 1 << 20
"""Parts of the search index that grows meanwhile are larger, and made by whichever thread comes."""


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        InputError: The address or port cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        place = socket.create_server((host, port), family=family, backlog=128)
        # Its connections take it over. Without it an answer's body waits until the other side has
        # acknowledged the head, for 40 ms; asyncio sees to that for sockets of its own making only.
        place.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return place
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if number and number > 0 else str(error)
        hint = "; choose another with  --port" if number == errno.EADDRINUSE else ""
        raise InputError(f"cannot listen at {host} port {port}: {reason}{hint}") from error


class Server:
    """A console that answers in a thread of its own, from `start` until `end`."""

    def __init__(
        self,
        desk: Desk,
        access: Access,
        place: socket.socket,
        names: Iterable[str] = (),
        live: Live | None = None,
        tls: ssl.SSLContext | None = None,
        onvif: OnvifRoutes | None = None,
    ) -> None:
        """Prepare to serve.

        Args:
            desk: What it can do.
            access: Who may do it.
            place: See `listening`; whoever made it closes it.
            names: By which the server is called.
            live: Reads what cameras do.
            tls: See `tls_context`.
            onvif: Answers searches by ONVIF.
        """
        self._place = place
        self._live = live or Live(())
        log_seldom("uvicorn.error")
        config = uvicorn.Config(
            make_app(desk, access, names, self._live, onvif),
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
        """Where it answers."""

    def start(self) -> None:
        """Begin to answer; from here on this process gives large blocks back."""
        keep_little(_LARGEST_IN_HEAP)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; return whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def end(self) -> None:
        """Answer what has been asked, and end."""
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

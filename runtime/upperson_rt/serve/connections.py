"""Connections: what TLS they speak, and for how long one that asks nothing is waited for.

`guard` sees requests. Whoever opens connections and sends none, or half of one, would hold the
files that this process may have open, until nobody else gets in.
"""

import asyncio
import ssl
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from upperson_rt.errors import InputError
from upperson_rt.serve.crowd import Crowd, network_of

__all__ = ["Connection", "Loop", "tls_context"]

_MOST_IDLE = 256
_REQUEST_WITHIN_S = 15.0
"""The head of a request must be there after so long; uvicorn waits for ever."""
_HANDSHAKE_WITHIN_S = 10.0
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


class Connection(H11Protocol):
    """One connection."""

    request_within_s = _REQUEST_WITHIN_S
    _idle: ClassVar[WeakKeyDictionary[ServerState, Crowd]] = WeakKeyDictionary()
    """Of each server the connections that ask nothing now."""
    _timer: asyncio.TimerHandle | None = None
    _place: object | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._wait(self.transport.abort)

    def data_received(self, data: bytes) -> None:
        """Take what comes."""
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request, which may be there already."""
        self._wait(self.timeout_keep_alive_handler)
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self, leave: Callable[[], None]) -> None:
        self._stop_waiting()
        crowd = self._idle.setdefault(self.server_state, Crowd(_MOST_IDLE))
        self._place = crowd.enter(network_of(self.client[0] if self.client else ""), leave)
        self._timer = self.loop.call_later(self.request_within_s, self.transport.abort)

    def _look(self) -> None:
        """Wait no longer if a request is being answered; who sends it is the guard's business."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._place is not None:
            self._idle[self.server_state].leave(self._place)
            self._place = None


class Loop(asyncio.SelectorEventLoop):
    """An event loop that does not wait for a handshake of TLS as long as asyncio does, a minute."""

    async def create_server(self, *args: Any, **more: Any) -> asyncio.base_events.Server:
        """Return a server, see asyncio."""
        if more.get("ssl") is not None:
            more["ssl_handshake_timeout"] = _HANDSHAKE_WITHIN_S
        return await super().create_server(*args, **more)


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

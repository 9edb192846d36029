"""Stands between FFmpeg and an RTSP camera, because FFmpeg follows redirects to any host.

FFmpeg connects to a port of this machine and knows no password. The connection to the camera, its
certificate and its login are ours, and no answer with a redirect is passed on.
"""

import re
import secrets
import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from upperson_camera.access import (
    Access,
    answer_challenge,
    escaped,
    login_of,
    place_of,
    without_login,
)
from upperson_network.remote import opening_within

_CHUNK_BYTES = 65536
_LONGEST_HEAD_BYTES = 2**14
_PACKET = 0x24
"""The first byte of a packet between messages: ``$``, channel, and length in two bytes."""
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_FIELD = re.compile(r"([A-Za-z0-9-]+):[ \t]*([^\r\n\0]*)")
"""FFmpeg takes a ``$`` that begins a line for a packet, and leaves out each ``\\r``."""
_STATUS = re.compile(r"RTSP/1\.\d +([1-5]\d\d)( [ -~]*)?")
_REQUEST = re.compile(r"([A-Z_]+) ([!-~]+) RTSP/1\.\d")
_LAST_S = 0.5
"""For what FFmpeg sends when it closes a stream."""


@dataclass(frozen=True, slots=True)
class _Message:
    first: str
    fields: tuple[tuple[str, str], ...]
    body: bytes

    def values(self, name: str) -> list[str]:
        return [value for found, value in self.fields if found.lower() == name]

    def encoded(self) -> bytes:
        """Return it in one form only: FFmpeg must not take it for another message than we do."""
        lines = [self.first, *(f"{name}: {value}" for name, value in self.fields)]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + self.body


class _Units:
    """Parts of what one side sends: messages, and runs of packets between them."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._wanted = 0
        """With fewer bytes nothing more is complete."""

    def add(self, received: bytes) -> "Iterator[bytes | _Message]":
        """Yield what is complete."""
        buffer = self._buffer
        buffer += received
        if len(buffer) < self._wanted:
            return
        self._wanted = start = at = 0
        while at < len(buffer):
            if buffer[at] == _PACKET:
                if len(buffer) < at + 4:
                    break
                end = at + 4 + int.from_bytes(buffer[at + 2 : at + 4], "big")
                if len(buffer) < end:
                    break
                at = end
                continue
            if at > start:
                yield bytes(buffer[start:at])
                start = at
            if buffer[at] in b"\r\n":
                start = at = at + 1
                continue
            message, end = _message(buffer, at)
            if message is None:
                self._wanted = end - start
                break
            start = at = end
            yield message
        if at > start:
            yield bytes(buffer[start:at])
        del buffer[:at]


def _message(buffer: bytearray, at: int) -> tuple[_Message | None, int]:
    """Return the message at a place, None if it is not complete, and where it ends at least."""
    end = _HEAD_END.search(buffer, at)
    if end is None:
        if len(buffer) - at > _LONGEST_HEAD_BYTES:
            raise ValueError("a message is too long")
        return None, at
    first, *lines = re.split(r"\r?\n", buffer[at : end.start()].decode("latin-1"))
    if _STATUS.fullmatch(first) is None and _REQUEST.fullmatch(first) is None:
        raise ValueError("no message begins so")
    found_fields = filter(None, map(_FIELD.fullmatch, lines))
    fields = tuple((field[1], field[2]) for field in found_fields)
    found = _Message(first, fields, b"")
    lengths = set(found.values("content-length")) or {"0"}
    if len(lengths) > 1 or re.fullmatch("[0-9]{1,6}", length := lengths.pop()) is None:
        raise ValueError("a message has no clear length")
    stop = end.end() + int(length)
    if len(buffer) < stop:
        return None, stop
    return replace(found, body=bytes(buffer[end.end() : stop])), stop


class Relay:
    """A camera's RTSP at a port of this machine, for one reader in this process.

    Attributes:
        address: What FFmpeg opens; others on this machine do not know its path.
        location: Where the camera sent us instead of an answer; None if it did not.
    """

    def __init__(self, address: str, access: Access, timeout_s: float) -> None:
        """Connect to the camera."""
        parts = urlsplit(escaped(address))
        self._login = login_of(parts)
        self._origin = without_login(parts._replace(path="", query="", fragment=""))
        context = access.context(self._origin) if parts.scheme == "rtsps" else None
        with opening_within(timeout_s) as limit:
            self._camera = limit.connect(*place_of(parts), context)
        self._camera.settimeout(None)
        self.location: str | None = None
        self._request: _Message | None = None
        self._challenges: list[str] = []
        self._is_answered = False
        family = self._camera.family  # A camera of IPv6 sends UDP to a port of IPv6.
        here = "::1" if family == socket.AF_INET6 else "127.0.0.1"
        self._listener = socket.create_server((here, 0), family=family)
        self._listener.settimeout(timeout_s)
        host = f"[{here}]" if ":" in here else here
        self._prefix = f"rtsp://{host}:{self._listener.getsockname()[1]}/{secrets.token_hex(16)}"
        rest = parts._replace(scheme="", netloc="", fragment="").geturl()
        self.address = self._prefix + rest
        self._thread = threading.Thread(target=self._run, name="rtsp relay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it; what FFmpeg sent last still goes out."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # Ends `accept`.
        self._listener.close()
        self._thread.join(_LAST_S)
        with suppress(OSError):
            self._camera.shutdown(socket.SHUT_RDWR)
        self._camera.close()

    def _run(self) -> None:
        with suppress(OSError, ValueError), closing(self._camera):
            while True:
                reader, _ = self._listener.accept()
                with closing(reader):
                    reader.settimeout(None)
                    if self._pass_on(reader):
                        return

    def _pass_on(self, reader: socket.socket) -> bool:
        """Pass on what both sides send until one ends; return False if it was not our reader."""
        requests, answers = _Units(), _Units()
        with selectors.DefaultSelector() as selector:
            for side in (reader, self._camera):
                selector.register(side, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                if reader in ready:
                    received = reader.recv(_CHUNK_BYTES)
                    for unit in requests.add(received):
                        if self._request is None and not self._is_ours(unit):
                            return False
                        self._camera.sendall(self._to_camera(unit))
                    if not received:
                        return self._request is not None
                if self._camera in ready and not self._answer(reader, answers):
                    return True

    def _answer(self, reader: socket.socket, answers: _Units) -> bool:
        """Pass on what the camera sends; return whether to go on."""
        while True:
            received = self._camera.recv(_CHUNK_BYTES)
            for unit in answers.add(received):
                passed = self._to_reader(unit)
                if self.location is not None:
                    return False
                if passed:
                    reader.sendall(passed)
            if not received:
                return False
            # TLS may hold what no selector sees.
            if not getattr(self._camera, "pending", int)():
                return True

    def _is_ours(self, unit: bytes | _Message) -> bool:
        request = None if isinstance(unit, bytes) else _REQUEST.fullmatch(unit.first)
        return request is not None and request[2].startswith(self._prefix)

    def _to_camera(self, unit: bytes | _Message) -> bytes:
        if isinstance(unit, bytes):
            return unit
        self._request = replace(unit, first=unit.first.replace(self._prefix, self._origin, 1))
        self._is_answered = False
        return self._with_login(self._request)

    def _with_login(self, message: _Message) -> bytes:
        if (request := _REQUEST.fullmatch(message.first)) is not None:
            method, target = request[1], request[2]
            answer = answer_challenge(self._challenges, self._login, target, method, target)
            if answer is not None:
                message = replace(message, fields=(*message.fields, ("Authorization", answer)))
        return message.encoded()

    def _to_reader(self, unit: bytes | _Message) -> bytes:
        """Return what the reader gets of an answer; nothing of a challenge that is answered."""
        if isinstance(unit, bytes):
            return unit
        status = _STATUS.fullmatch(unit.first)
        if status is None:
            return unit.encoded()
        if status[1].startswith("3"):
            self.location = next(iter(unit.values("location")), "")
        challenges = unit.values("www-authenticate")
        is_challenge = status[1] == "401" and self._login is not None and challenges
        if is_challenge and self._request is not None and not self._is_answered:
            self._challenges, self._is_answered = challenges, True
            self._camera.sendall(self._with_login(self._request))
            return b""
        fields = tuple(
            (name, self._own_source(value) if name.lower() == "transport" else value)
            for name, value in unit.fields
        )
        return _Message(f"RTSP/1.0 {status[1]}{status[2] or ''}", fields, unit.body).encoded()

    def _own_source(self, transport: str) -> str:
        """Have UDP come from the camera, not from this machine nor from where the camera says."""
        parts = transport.split(";")
        kept = [part for part in parts if not part.strip().lower().startswith("source")]
        if "tcp" not in kept[0].lower():
            kept.append(f"source={self._camera.getpeername()[0]}")
        return ";".join(kept)

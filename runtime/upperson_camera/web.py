"""Reads HTTP for FFmpeg, which opens nothing by itself: redirects, playlists, logins, certificates.

FFmpeg would follow redirects and playlists to any host, and what it believes of a certificate
depends on the library that it was built with.
"""

import errno
import http.client
import io
import ssl
import time
from urllib.parse import unquote, urlsplit

from upperson_camera.access import (
    MOST_REDIRECTS,
    RefusedAddressError,
    escaped,
    target_of,
    without_login,
)
from upperson_camera.hls import Playlist
from upperson_camera.reasons import answer_challenge
from upperson_camera.source import Source
from upperson_network.remote import http_connection, http_target, opening_within
from upperson_rt.errors import InputError

__all__ = ["WebReader"]

_FAILURES = (InputError, OSError, ValueError, http.client.HTTPException)
_REDIRECTS = (301, 302, 303, 307, 308)


class _WebFile(io.RawIOBase):
    """One answer over HTTP as a file that FFmpeg reads, up to the offset ``end``."""

    def __init__(self, web: "WebReader", address: str, start: int = 0, end: int | None = None):
        self._web, self._end = web, end
        self._at = self._next = start
        """Where FFmpeg is, and where the answer is."""
        self._address, self._response = web.get(address, start, end)
        self.name = without_login(urlsplit(self._address))
        """What FFmpeg takes relative addresses of a playlist for relative to."""
        self.kind = self._response.headers.get_content_type()
        length = self._response.length
        self._size = None if length is None else start + length

    def read(self, size: int = -1) -> bytes:
        """Return what is there, at most ``size`` bytes; nothing at the end."""
        if self._at != self._next:
            self.close()
            self._address, self._response = self._web.get(self._address, self._at, self._end)
            self._next = self._at
        # A server that knows no parts goes on behind the end.
        content = self._response.read1(
            size if self._end is None else min(size, self._end - self._at)
        )
        self._next += len(content)
        self._at = self._next
        return content

    def starts_with(self, start: bytes) -> bool:
        """Whether the answer, of which nothing was read, begins with some bytes."""
        return self._response.peek(len(start)).startswith(start)

    def seekable(self) -> bool:
        """Whether the server gives parts of it."""
        return self._size is not None and self._response.headers.get("Accept-Ranges") == "bytes"

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Have the next `read` begin elsewhere."""
        begin = {io.SEEK_CUR: self._at, io.SEEK_END: self._size or 0}.get(whence, 0)
        self._at = begin + offset
        return self._at

    def tell(self) -> int:
        """Return the offset of the next byte."""
        return self._at

    def close(self) -> None:
        """Close the connection."""
        self._web.end(self._response)


class WebReader:
    """The file that FFmpeg reads of a camera's stream over HTTP, within one time limit at a time.

    Attributes:
        problem: What failed while FFmpeg was reading, which sees the end of the file instead.
    """

    def __init__(self, source: Source, timeout_s: float) -> None:
        """Open the camera's own address; a playlist is one file."""
        self._source, self._timeout_s = source, timeout_s
        self.problem: Exception | None = None
        self._responses: set[http.client.HTTPResponse] = set()
        self._context: ssl.SSLContext | None = None
        self._until = 0.0
        self.start_time()
        try:
            self._file = self._opened()
        except BaseException:
            self.close()
            raise

    def _opened(self) -> "_WebFile | Playlist":
        file = _WebFile(self, self._source.address)
        if not file.starts_with(b"#EXTM3U"):
            return file
        return Playlist(file, self._open_named, self.check_time)

    def _open_named(self, name: str, base: str, start: int, end: int | None) -> _WebFile:
        own = self._source
        return _WebFile(self, target_of(own.address, name, base, own.access), start, end)

    @property
    def name(self) -> str:
        """The address, without a login."""
        return self._file.name

    @property
    def kind(self) -> str | None:
        """FFmpeg's name for what the server says it sends; None leaves it to FFmpeg."""
        is_jpeg = getattr(self._file, "kind", "") == "multipart/x-mixed-replace"
        return "mpjpeg" if is_jpeg else None

    def read(self, size: int) -> bytes:
        """Return what is there, at most ``size`` bytes; nothing at the end or after a failure."""
        try:
            self.check_time()
            return self._file.read(size)
        except _FAILURES as error:
            self.problem = error
            return b""

    def seekable(self) -> bool:
        """Whether the server gives parts of it."""
        return self._file.seekable()

    def seek(self, offset: int, whence: int) -> int:
        """Have the next `read` begin elsewhere."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the offset of the next byte."""
        return self._file.tell()

    def start_time(self) -> None:
        """Give the next picture its time."""
        self._until = time.monotonic() + self._timeout_s

    def check_time(self) -> float:
        """Return how many seconds are left."""
        left_s = self._until - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(errno.ETIMEDOUT, f"nothing came within {self._timeout_s:g} s")
        return left_s

    def end(self, response: http.client.HTTPResponse) -> None:
        """Close an answer."""
        response.close()
        self._responses.discard(response)

    def close(self) -> None:
        """Close all answers."""
        for response in list(self._responses):
            self.end(response)

    def get(
        self, address: str, start: int, end: int | None
    ) -> tuple[str, http.client.HTTPResponse]:
        """Return the last address of redirects and its answer."""
        for _ in range(MOST_REDIRECTS + 1):
            address = escaped(address)
            response = self._get_with_login(address, start, end)
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or location is None:
                if not 200 <= response.status < 300 or (start and response.status != 206):
                    self.end(response)
                    raise OSError(0, f"the server answers {response.status}")
                return address, response
            self.end(response)
            base = without_login(urlsplit(address))
            address = target_of(self._source.address, location, base, self._source.access)
        raise RefusedAddressError(
            f"it sends on more than {MOST_REDIRECTS} times", code="too_many_redirects"
        )

    def _get_with_login(
        self, address: str, start: int, end: int | None
    ) -> http.client.HTTPResponse:
        parts = urlsplit(address)
        headers = {"Connection": "close"}
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        response = self._get_once(address, headers)
        if response.status == 401 and parts.username is not None:
            login = unquote(parts.username), unquote(parts.password or "")
            plain, target = without_login(parts), http_target(address)
            challenges = response.headers.get_all("WWW-Authenticate", [])
            answer = answer_challenge(challenges, login, plain, "GET", target)
            if answer is not None:
                self.end(response)
                response = self._get_once(address, headers | {"Authorization": answer})
        return response

    def _get_once(self, address: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        if self._context is None and urlsplit(address).scheme == "https":
            self._context = self._source.access.context(without_login(urlsplit(address)))
        with opening_within(self.check_time()) as limit:
            connection = http_connection(limit, address, self._context)
            connection.request("GET", http_target(address), headers=headers)
            connected = connection.sock
            response = connection.getresponse()
            connected.settimeout(self._timeout_s)  # For a pause; `check_time` is for all of them.
            limit.close()  # The answer keeps the socket until it is closed, too.
        self._responses.add(response)
        return response

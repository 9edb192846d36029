"""Reads HTTP for FFmpeg, which opens nothing by itself: redirects, playlists, logins, certificates.

FFmpeg would follow redirects and playlists to any host, and what it believes of a certificate
depends on the library that it was built with.
"""

import errno
import http.client
import io
import itertools
import re
import ssl
import time
from collections import deque
from dataclasses import dataclass
from urllib.parse import urlsplit

from upperson_camera.access import answer_challenge, escaped, login_of, target_of, without_login
from upperson_camera.source import Source
from upperson_network.remote import http_connection, http_target, opening_within
from upperson_rt.errors import InputError

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
        return self._size is not None and self._response.headers.get("Accept-Ranges") == "bytes"

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        begin = {io.SEEK_CUR: self._at, io.SEEK_END: self._size or 0}.get(whence, 0)
        self._at = begin + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self._web.end(self._response)


class WebReader:
    """The file that FFmpeg reads of a camera's stream over HTTP, within one time limit at a time.

    Attributes:
        problem: What failed while FFmpeg was reading, which sees the end of the file instead.
        name: The address, without a login.
        kind: FFmpeg's name for what the server says it sends; None leaves it to FFmpeg.
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
            file = _WebFile(self, source.address)
            self.kind = "mpjpeg" if file.kind == "multipart/x-mixed-replace" else None
            self._file: _WebFile | _Playlist = file
            if file.starts_with(b"#EXTM3U"):
                self._file, self.kind = _Playlist(self, file), None
        except BaseException:
            self.close()
            raise
        self.name = self._file.name
        self.seekable, self.seek, self.tell = (
            self._file.seekable,
            self._file.seek,
            self._file.tell,
        )

    def open_named(self, name: str, base: str, start: int = 0, end: int | None = None) -> _WebFile:
        """Open what a playlist names, if the camera may send its reader there."""
        own = self._source
        return _WebFile(self, target_of(own.address, name, base, own.access), start, end)

    def read(self, size: int) -> bytes:
        """Return what is there, at most ``size`` bytes; nothing at the end or after a failure."""
        try:
            self.check_time()
            return self._file.read(size)
        except _FAILURES as error:
            self.problem = error
            return b""

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
        for redirects in itertools.count():
            address = escaped(address)
            response = self._get_with_login(address, start, end)
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or location is None:
                break
            self.end(response)
            own = self._source
            address = target_of(own.address, location, address, own.access, redirects=redirects)
        if not 200 <= response.status < 300 or (start and response.status != 206):
            self.end(response)
            raise OSError(0, f"the server answers {response.status}")
        return address, response

    def _get_with_login(
        self, address: str, start: int, end: int | None
    ) -> http.client.HTTPResponse:
        parts, headers = urlsplit(address), {"Connection": "close"}
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        response = self._get_once(address, headers)
        if response.status == 401:
            challenges = response.headers.get_all("WWW-Authenticate", [])
            answer = answer_challenge(
                challenges, login_of(parts), without_login(parts), "GET", http_target(address)
            )
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


# --- A playlist of HLS as one file: FFmpeg reads segments as they come, and opens none of them

_MOST_BYTES = 2**20
_LIVE_SEGMENTS = 3
"""Of a playlist that goes on, so many from its end are read at first."""
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.25, 5.0
_ATTRIBUTE = re.compile(r'(?<![A-Z0-9-])([A-Z0-9-]+)=("[^"]*"|[^,]*)')


@dataclass(frozen=True, slots=True)
class _Part:
    number: int
    name: str
    start: int = 0
    end: int | None = None
    header: "_Part | None" = None
    """What a decoder needs before it."""


class _Playlist(io.RawIOBase):
    """Reads the segments of a playlist one after the other, of the best of several variants."""

    def __init__(self, web: WebReader, file: _WebFile) -> None:
        """Find the media playlist."""
        self._web, self.name = web, file.name
        self._files: list[_WebFile] = []
        self._header: _Part | None = None
        self._last = -1
        text = self._text_of(file)
        variant = _best_variant(text)
        if variant is not None:
            found = web.open_named(variant, self.name)
            self.name, text = found.name, self._text_of(found)
        self._take(text, at_first=True)

    def read(self, size: int = -1) -> bytes:
        while True:
            if self._files:
                if content := self._files[0].read(size):
                    return content
                self._files.pop(0).close()
            elif self._parts:
                self._begin(self._parts.popleft())
            elif self._is_complete:
                return b""
            else:
                time.sleep(min(self._wait_s, self._web.check_time()))
                self._take(self._text_of(self._web.open_named(self.name, self.name)))

    def _begin(self, part: _Part) -> None:
        for one in (part.header, part):
            if one is not None and (one is part or one != self._header):
                self._files.append(self._web.open_named(one.name, self.name, one.start, one.end))
        self._header = part.header
        self._last = part.number

    def _text_of(self, file: _WebFile) -> str:
        content = b""
        while len(content) < _MOST_BYTES and (more := file.read(_MOST_BYTES)):
            self._web.check_time()
            content += more
        file.close()
        return content.decode("utf-8", "replace")

    def _take(self, text: str, *, at_first: bool = False) -> None:
        """Queue the segments that are new."""
        parts, target_s, self._is_complete = _parts(text)
        if at_first and not self._is_complete:
            parts = parts[-_LIVE_SEGMENTS:]
        elif parts and parts[-1].number < self._last:  # The camera counts from the beginning again.
            self._last = -1
        self._parts = deque(part for part in parts if part.number > self._last)
        self._wait_s = min(max(target_s / 2, _SHORTEST_WAIT_S), _LONGEST_WAIT_S)


def _attributes(line: str) -> dict[str, str]:
    return {name: value.strip('"') for name, value in _ATTRIBUTE.findall(line.partition(":")[2])}


def _number(text: str) -> int:
    return int(text) if re.fullmatch(r"[0-9]{1,15}", text) else 0


def _best_variant(text: str) -> str | None:
    """Return the name of the playlist with the largest bandwidth; None for a list of segments."""
    best, bandwidth, name = -1, -1, None
    for line in map(str.strip, text.splitlines()):
        if line.startswith("#EXT-X-STREAM-INF:"):
            bandwidth = _number(_attributes(line).get("BANDWIDTH", "0"))
        elif line and not line.startswith("#") and bandwidth >= 0:
            if bandwidth > best:
                best, name = bandwidth, line
            bandwidth = -1
    return name


def _parts(text: str) -> tuple[list[_Part], float, bool]:
    """Return the segments, how long one lasts in seconds, and whether no more will come."""
    parts: list[_Part] = []
    number, target_s, header, part_range, end = 0, 1.0, None, "", 0
    for line in map(str.strip, text.splitlines()):
        value = line.partition(":")[2]
        if line.startswith("#EXT-X-MEDIA-SEQUENCE:"):
            number = _number(value)
        elif line.startswith("#EXT-X-TARGETDURATION:"):
            target_s = float(_number(value))
        elif line.startswith("#EXT-X-KEY:"):
            if _attributes(line).get("METHOD") != "NONE":
                raise InputError(
                    "its segments are encrypted, which is not read", code="playlist_encrypted"
                )
        elif line.startswith("#EXT-X-MAP:"):
            found = _attributes(line)
            start, stop = _range(found.get("BYTERANGE", ""), 0)
            header = _Part(0, found.get("URI", ""), start, stop)
        elif line.startswith("#EXT-X-BYTERANGE:"):
            part_range = value
        elif line and not line.startswith("#"):
            start, stop = _range(part_range, end)
            parts.append(_Part(number, line, start, stop, header))
            number, part_range, end = number + 1, "", stop or 0
    return parts, target_s, "\n#EXT-X-ENDLIST" in text


def _range(text: str, after: int) -> tuple[int, int | None]:
    """Return first byte and end of ``length@start``; without a start it follows the last one."""
    length, at, start = text.partition("@")
    if not text:
        return 0, None
    begin = _number(start) if at else after
    return begin, begin + _number(length)

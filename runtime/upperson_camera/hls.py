"""A playlist of HLS as one file: FFmpeg reads segments as they come, and opens none of them."""

import io
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from upperson_rt.errors import InputError

__all__ = ["Playlist"]

_MOST_BYTES = 2**20
_LIVE_SEGMENTS = 3
"""Of a playlist that goes on, so many from its end are read at first."""
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.25, 5.0
_ATTRIBUTE = re.compile(r'(?<![A-Z0-9-])([A-Z0-9-]+)=("[^"]*"|[^,]*)')


class _File(Protocol):
    name: str

    def read(self, size: int) -> bytes: ...
    def close(self) -> None: ...


_Open = Callable[[str, str, int, int | None], _File]
"""Opens what a playlist names: the name, what it is relative to, first byte, end."""


@dataclass(frozen=True, slots=True)
class _Part:
    number: int
    name: str
    start: int = 0
    end: int | None = None
    header: "_Part | None" = None
    """What a decoder needs before it."""


class Playlist(io.RawIOBase):
    """Reads the segments of a playlist one after the other, of the best of several variants."""

    def __init__(self, file: _File, open_file: _Open, check_time: Callable[[], float]) -> None:
        """Find the media playlist."""
        self.name, self._open, self._check_time = file.name, open_file, check_time
        self._files: list[_File] = []
        self._header: _Part | None = None
        self._last = -1
        text = self._text_of(file)
        variant = _best_variant(text)
        if variant is not None:
            found = self._open(variant, self.name, 0, None)
            self.name, text = found.name, self._text_of(found)
        self._take(text, at_first=True)

    def read(self, size: int = -1) -> bytes:
        """Return what is there; nothing at the end."""
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
                time.sleep(min(self._wait_s, self._check_time()))
                self._take(self._text_of(self._open(self.name, self.name, 0, None)))

    def close(self) -> None:
        """Close what is open."""
        while self._files:
            self._files.pop().close()

    def _begin(self, part: _Part) -> None:
        for one in (part.header, part):
            if one is not None and (one is part or one != self._header):
                self._files.append(self._open(one.name, self.name, one.start, one.end))
        self._header = part.header
        self._last = part.number

    def _text_of(self, file: _File) -> str:
        content = b""
        while len(content) < _MOST_BYTES and (more := file.read(_MOST_BYTES)):
            self._check_time()
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

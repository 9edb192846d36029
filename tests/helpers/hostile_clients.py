"""Bodies and pictures that would take much memory or time."""

import binascii
import io
import json
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

MIB = 1 << 20
_JSON = {"content-type": "application/json"}
_FORM = {"content-type": "application/x-www-form-urlencoded"}
_FILE = 'name="picture"; filename="a"'
_BOTH = "/api/v1/search/picture"


class Sent(NamedTuple):
    """A request."""

    path: str
    headers: dict[str, str] = {}  # noqa: RUF012 - It is never changed.
    body: bytes = b""


def png_of_chunks(count: int) -> bytes:
    """Return a PNG of 8 x 8 pixels with so many empty chunks before its pixels."""

    def chunk(kind: bytes, content: bytes = b"") -> bytes:
        check = binascii.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    rows = zlib.compress((b"\0" + bytes(24)) * 8)
    return start + chunk(b"teSt") * count + chunk(b"IDAT", rows) + chunk(b"IEND")


def jpeg_of_segments(segment: bytes, count: int) -> bytes:
    """Return a JPEG with so many segments, or other bytes, behind its first two bytes."""
    plain = _black("JPEG")
    return plain[:2] + segment * count + plain[2:]


def gif_of_blocks(count: int) -> bytes:
    """Return a GIF with a comment of so many blocks of one byte."""
    plain = _black("GIF")
    at = plain.index(b"\x2c")
    return plain[:at] + b"\x21\xfe" + b"\x01x" * count + b"\0" + plain[at:]


def _black(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def _form(path: str, *parts: tuple[str, bytes]) -> Sent:
    """Return a form; each part is what follows ``form-data;``, and content."""
    body = b"".join(
        b"--x\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + content + b"\r\n"
        for head, content in parts
    )
    return Sent(path, {"content-type": "multipart/form-data; boundary=x"}, body + b"--x--\r\n")


def _search(body: bytes) -> Sent:
    return Sent("/api/v1/search", _JSON, body)


def _embed(*inputs: str) -> Sent:
    return Sent("/v1/embeddings", _JSON, json.dumps({"input": inputs}).encode())


def _keys(count: int) -> str:
    return "{" + ",".join(f'"k{n}":1' for n in range(count)) + "}"


KINDS: dict[str, Callable[[], Sent]] = {
    "one text of 18 MB": lambda: _embed("red " * (18 * MIB // 4)),
    "a million keys": lambda: _search(_keys(1_000_000).encode()),
    "a million elements": lambda: _embed(*(["a"] * 1_000_000)),
    "a nest of a million": lambda: _search(b"[" * 1_000_000),
    "a form of 900 files": lambda: _form("/picture", *[(_FILE, bytes(20_000))] * 900),
    "a form of 2,500 fields": lambda: _form(_BOTH, *[('name="search"', b"x" * 7000)] * 2500),
    "a form with a million keys": lambda: _form(
        _BOTH, (_FILE, gif_of_blocks(1)), ('name="search"', _keys(80_000).encode())
    ),
    "a million fields": lambda: Sent("/saved", _FORM, b"a&" * 1_000_000),
}

"""A file as response, or the part of it that a request asks for (RFC 9110, Range)."""

import os
import re
from collections.abc import Collection
from pathlib import Path

from fastapi import Request, Response
from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send

from upperson_console.problems import ProblemError

_RANGE = re.compile(r"([0-9]{0,99})-([0-9]{0,99})")


def file_response(
    request: Request, path: Path, found: os.stat_result, media_type: str, filename: str
) -> FileResponse:
    """Return a file, or its part if the request has a valid Range header of one range in bytes.

    A malformed Range header, or one of another unit, is ignored.

    Raises:
        ProblemError: 416, the range is beyond the end of the file, or there are several.
    """
    response = _File(
        path,
        media_type=media_type,
        filename=filename,
        stat_result=found,
        content_disposition_type="inline",
    )
    same = response.headers["etag"], response.headers["last-modified"]
    response.is_whole = _wanted(request, found.st_size, same) is None
    return response


def bytes_response(request: Request, content: bytes, media_type: str, filename: str) -> Response:
    """Return bytes as `file_response` returns a file."""
    headers = {
        "Accept-Ranges": "bytes",
        "Content-Disposition": f'inline; filename="{filename}"',
    }
    part = _wanted(request, len(content), ())
    if part is None:
        return Response(content, 200, headers, media_type)
    headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{len(content)}"
    return Response(content[part.start : part.stop], 206, headers, media_type)


def _wanted(request: Request, size: int, validators: Collection[str]) -> range | None:
    """Return the one range of bytes that a request asks for; None for all of them."""
    condition = request.headers.get("if-range")
    ranges = _byte_ranges(request.headers.get("range", ""))
    if not ranges or (condition is not None and condition not in validators):
        return None
    headers = {"Content-Range": f"bytes */{size}"}
    if len(ranges) > 1:
        what = "ask for one range of a file at a time"
        raise ProblemError(416, what, headers, code="several_ranges")
    ((first, last),) = ranges
    if not size or (last == 0 if first is None else first >= size):
        what = f"the file has {size:,} bytes: ask for a range that begins within it"
        raise ProblemError(416, what, headers, code="range_unsatisfiable")
    if first is None:
        return range(max(0, size - (last or 0)), size)
    return range(first, size if last is None else min(last + 1, size))


class _File(FileResponse):
    """Sends the whole file, also if the request has a Range header, while `is_whole`."""

    is_whole = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.is_whole:
            headers = [pair for pair in scope["headers"] if pair[0] != b"range"]
            scope = {**scope, "headers": headers}
        await super().__call__(scope, receive, send)


def _byte_ranges(header: str) -> list[tuple[int | None, int | None]]:
    """Return first and last byte of each range of a header; none if it is malformed.

    Without a first byte the last one is the number of bytes at the end.
    """
    unit, _, listed = header.partition("=")
    if unit.strip().lower() != "bytes":
        return []
    ranges = []
    for part in filter(None, map(str.strip, listed.split(","))):
        match = _RANGE.fullmatch(part)
        if match is None:
            return []
        first, last = (int(number) if number else None for number in match.groups())
        if last is None if first is None else last is not None and last < first:
            return []
        ranges.append((first, last))
    return ranges

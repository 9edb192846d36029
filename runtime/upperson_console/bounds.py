"""Limits of a request's body, checked on its bytes before it is parsed as JSON or a form.

A parsed tree takes up to a hundred times the bytes of its text, and more for the errors of a
million unknown keys. So length, elements, depth and the longest text are counted first, at the
speed of `bytes.find`. `BoundedRoute` does so for each route of a router.
"""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response, params
from fastapi.routing import APIRoute
from starlette.types import Message

from upperson_console.problems import ProblemError, invalid

EMBEDDINGS = "/v1/embeddings"
"""The one route whose JSON may hold pictures."""

LARGE_BODIES = frozenset({EMBEDDINGS, "/api/v1/pictures", "/api/v1/search/picture", "/picture"})
"""Routes that take pictures; the bodies of all others are small."""

_MOST_ELEMENTS = 4_000
"""Keys, values and elements of a JSON document; an export has 500 ids and its search."""
_MOST_DEPTH = 16
_LONGEST_TEXT_BYTES = 24 << 10
"""2,000 letters, each written as two escapes."""
_MOST_BETWEEN_BYTES = 256 << 10
"""Between the texts: numbers, punctuation and white space."""
_MOST_FIELDS = 2_100
"""Of a form; an export has 2,000 ids."""
_MOST_FILES = 1
_PICTURE = b"data:"
_NO_BRACKETS = bytes({*range(256)} - {*b"[]{}"})


def check_json(content: bytes) -> None:
    """Refuse a JSON document beyond the limits; raises ProblemError, see `JsonBounds`."""
    JsonBounds().feed(content)


class JsonBounds:
    """Counts a JSON document part by part, and refuses it at the first part beyond a limit.

    Malformed JSON may pass: the part that a parser would read is within the limits.
    """

    def __init__(self, may_hold_pictures: bool = False) -> None:
        """Begin a document; with pictures, texts that are data URLs may be of any length."""
        self._may_hold_pictures = may_hold_pictures
        self._quotes = self._elements = self._between = self._depth = 0
        self._is_text = self._is_escaped = False
        self._start, self._length = b"", 0
        """Of the text that is under way."""

    def feed(self, part: bytes) -> None:
        """Count a part."""
        if b"\0" in part:  # UTF-16 and UTF-32 would hide the counted characters.
            raise invalid("the body is no JSON in UTF-8: send it in UTF-8", "json_not_utf8")
        self._quotes += part.count(b'"')
        if self._quotes > 2 * _MOST_ELEMENTS:
            raise _too_many()
        if self._is_escaped:
            part = b"x" + part[1:]
        if b"\\" in part:  # An escaped quote is part of a text; the length stays the same.
            part = part.replace(b"\\\\", b"xx").replace(b'\\"', b"xx")
        self._is_escaped = part.endswith(b"\\")
        start = 0
        while start <= len(part):
            end = part.find(b'"', start)
            is_end, end = end >= 0, end if end >= 0 else len(part)
            (self._count_text if self._is_text else self._count_between)(part, start, end)
            if is_end:
                self._is_text, self._start, self._length = not self._is_text, b"", 0
            start = end + 1

    def _count_text(self, part: bytes, start: int, end: int) -> None:
        self._length += end - start
        self._start += part[start : min(end, start + len(_PICTURE) - len(self._start))]
        is_picture = self._may_hold_pictures and self._start == _PICTURE
        if self._length > _LONGEST_TEXT_BYTES and not is_picture:
            raise invalid(
                f"a text of the body has more than {_LONGEST_TEXT_BYTES:,} bytes: shorten the "
                "sentence or the name",
                "json_text_too_long",
            )

    def _count_between(self, part: bytes, start: int, end: int) -> None:
        self._between += end - start
        self._elements += part.count(b",", start, end) + part.count(b":", start, end)
        if self._between > _MOST_BETWEEN_BYTES or self._elements > _MOST_ELEMENTS:
            raise _too_many()
        for bracket in part[start:end].translate(None, _NO_BRACKETS):
            self._depth += 1 if bracket in b"[{" else -1
            if self._depth > _MOST_DEPTH:
                raise invalid(f"the body is nested more than {_MOST_DEPTH} deep", "json_too_deep")


def _too_many() -> ProblemError:
    return invalid(
        f"the body has more than {_MOST_ELEMENTS:,} keys, values and elements, or "
        f"{_MOST_BETWEEN_BYTES >> 10} KiB of them: send fewer at a time",
        "json_too_large",
    )


class BoundedRoute(APIRoute):
    """A route that checks the body before FastAPI parses it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler behind the check."""
        handle = super().get_route_handler()

        field = self.body_field

        async def checked(request: Request) -> Response:
            if field is not None and isinstance(field.field_info, params.Form):
                await _check_form(request)
            elif field is not None:
                request = Request(request.scope, _bounded(request))
                await request.body()  # FastAPI finds it in the request.
            return await handle(request)

        return checked


def _bounded(request: Request) -> Callable[[], Coroutine[Any, Any, Message]]:
    """Return a receive function that refuses a body at the first part beyond a limit."""
    bounds = JsonBounds(may_hold_pictures=request.url.path == EMBEDDINGS)

    async def receive() -> Message:
        message = await request.receive()
        bounds.feed(message.get("body", b""))
        return message

    return receive


async def _check_form(request: Request) -> None:
    if not request.headers.get("content-type", "").lower().startswith("multipart/"):
        content = await request.body()
        if content.count(b"&") + content.count(b";") >= _MOST_FIELDS:
            raise invalid(
                f"the form has more than {_MOST_FIELDS} fields: send fewer", "form_too_large"
            )
    await request.form(max_files=_MOST_FILES, max_fields=_MOST_FIELDS)

"""Bounds of a request's body, checked on its bytes before a form or a JSON tree is made of it.

A tree takes up to a hundred times the bytes that it is made of, and an error for each of a million
unknown keys more. So length, number, depth and the longest text are counted first, at the speed of
`bytes.find`. `BoundedRoute` does so for every route of a router.
"""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response, params
from fastapi.routing import APIRoute
from starlette.types import Message

from upperson_console.problems import ProblemError

__all__ = ["EMBEDDINGS", "LARGE_BODIES", "BoundedRoute", "JsonBounds", "check_json"]

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
_MOST_FIELDS = 600
"""Of a form; an export has 500 ids."""
_MOST_FILES = 1
_PICTURE = b"data:"
_NO_BRACKETS = bytes({*range(256)} - {*b"[]{}"})


def check_json(content: bytes) -> None:
    """Refuse a JSON document that is larger than any request needs, before it is parsed.

    Raises:
        ProblemError: See `JsonBounds`.
    """
    JsonBounds().feed(content)


class JsonBounds:
    """Counts a JSON document as its parts come, and refuses it at the first part beyond a bound.

    What is no JSON may pass: as far as a parser would read it, it is within the bounds.
    """

    def __init__(self, may_hold_pictures: bool = False) -> None:
        """Begin a document, whose texts may be data URLs of any length where it holds pictures."""
        self._may_hold_pictures = may_hold_pictures
        self._quotes = self._elements = self._between = self._depth = 0
        self._is_text = self._is_escaped = False
        self._start, self._length = b"", 0
        """Of the text that is under way."""

    def feed(self, part: bytes) -> None:
        """Count a part.

        Raises:
            ProblemError: The document has too many elements, is nested too deeply, holds a text
                that is too long, or is not UTF-8.
        """
        if b"\0" in part:  # Of UTF-16 and its like, which would hide what is counted here.
            raise ProblemError(422, "the body is no JSON in UTF-8: send it in UTF-8")
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
            raise ProblemError(
                422,
                f"a text of the body has more than {_LONGEST_TEXT_BYTES:,} bytes: shorten the "
                "sentence or the name",
            )

    def _count_between(self, part: bytes, start: int, end: int) -> None:
        self._between += end - start
        self._elements += part.count(b",", start, end) + part.count(b":", start, end)
        if self._between > _MOST_BETWEEN_BYTES or self._elements > _MOST_ELEMENTS:
            raise _too_many()
        for bracket in part[start:end].translate(None, _NO_BRACKETS):
            self._depth += 1 if bracket in b"[{" else -1
            if self._depth > _MOST_DEPTH:
                raise ProblemError(422, f"the body is nested more than {_MOST_DEPTH} deep")


def _too_many() -> ProblemError:
    return ProblemError(
        422,
        f"the body has more than {_MOST_ELEMENTS:,} keys, values and elements, or "
        f"{_MOST_BETWEEN_BYTES >> 10} KiB of them: send fewer at a time",
    )


class BoundedRoute(APIRoute):
    """A route whose body is checked before FastAPI parses it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of FastAPI behind the check."""
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
    """Return what receives a body and refuses it at the first part beyond a bound."""
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
            raise ProblemError(422, f"the form has more than {_MOST_FIELDS} fields: send fewer")
    await request.form(max_files=_MOST_FILES, max_fields=_MOST_FIELDS)

"""Bounds of a request's body, checked on its bytes before a form or a JSON tree is made of it.

A tree takes up to a hundred times the bytes that it is made of, and an error for each of a million
unknown keys more. So length, number, depth and the longest text are counted first, at the speed of
`bytes.find`. `BoundedRoute` does so for every route of a router.
"""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response, params
from fastapi.routing import APIRoute

from upperson_rt.serve.problems import ProblemError

__all__ = ["EMBEDDINGS", "LARGE_BODIES", "BoundedRoute", "check_json"]

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
_NO_BRACKETS = bytes({*range(256)} - {*b"[]{}"})


def check_json(content: bytes, may_hold_pictures: bool = False) -> None:
    """Refuse a JSON document that is larger than any request needs, before it is parsed.

    What is no JSON may pass: as far as a parser would read it, it is within the bounds.

    Args:
        content: The document, UTF-8.
        may_hold_pictures: Whether texts may be data URLs, which have no bound of their own.

    Raises:
        ProblemError: It has too many elements, is nested too deeply, holds a text that is too long,
            or is not UTF-8.
    """
    if b"\0" in content:  # Of UTF-16 and its like, which would hide what is counted here.
        raise ProblemError(422, "the body is no JSON in UTF-8: send it in UTF-8")
    if content.count(b'"') > 2 * _MOST_ELEMENTS:
        raise _too_many()
    if b"\\" in content:  # An escaped quote is part of a text; the length stays the same.
        content = content.replace(b"\\\\", b"xx").replace(b'\\"', b"xx")
    between = b"".join(_between_texts(content, may_hold_pictures))
    if between.count(b",") + between.count(b":") > _MOST_ELEMENTS:
        raise _too_many()
    depth = 0
    for bracket in between.translate(None, _NO_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > _MOST_DEPTH:
            raise ProblemError(422, f"the body is nested more than {_MOST_DEPTH} deep")


def _between_texts(content: bytes, may_hold_pictures: bool) -> list[bytes]:
    """Return what stands outside of quotes."""
    pieces, start, is_text, left = [], 0, False, _MOST_BETWEEN_BYTES
    while start <= len(content):
        end = content.find(b'"', start)
        end = len(content) if end < 0 else end
        if is_text:
            is_picture = may_hold_pictures and content.startswith(b"data:", start)
            if end - start > _LONGEST_TEXT_BYTES and not is_picture:
                raise ProblemError(
                    422,
                    f"a text of the body has {end - start:,} bytes, at most "
                    f"{_LONGEST_TEXT_BYTES:,} are taken: shorten the sentence or the name",
                )
        else:
            left -= end - start
            if left < 0:
                raise _too_many()
            pieces.append(content[start:end])
        start, is_text = end + 1, not is_text
    return pieces


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
            if field is not None:
                await _check(request, isinstance(field.field_info, params.Form))
            return await handle(request)

        return checked


async def _check(request: Request, is_form: bool) -> None:
    """Read a body within its bounds; FastAPI finds it in the request."""
    if not is_form:
        content = await request.body()
        check_json(content, may_hold_pictures=request.url.path == EMBEDDINGS)
        return
    if not request.headers.get("content-type", "").lower().startswith("multipart/"):
        content = await request.body()
        if content.count(b"&") + content.count(b";") >= _MOST_FIELDS:
            raise ProblemError(422, f"the form has more than {_MOST_FIELDS} fields: send fewer")
    await request.form(max_files=_MOST_FILES, max_fields=_MOST_FIELDS)

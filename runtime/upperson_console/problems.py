"""Errors of the console: problem+json (RFC 9457) for programs, and a page for people.

Both say in one line what was expected, what was found and what to do. Neither shows a traceback.
"""

from collections.abc import Mapping
from http import HTTPStatus

from upperson_console.limits import BusyError
from upperson_rt.errors import (
    BackendError,
    InputError,
    IntegrityError,
    UppersonError,
    UsageError,
)
from upperson_rt.printable import escape_for_display

MEDIA_TYPE = "application/problem+json"
_STATUS: dict[type[UppersonError], int] = {
    UsageError: 422,
    InputError: 422,
    BackendError: 503,
    IntegrityError: 503,
}
_CODES = {
    401: "login_required",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "body_timeout",
    413: "body_too_large",
    422: "request_invalid",
    429: "too_many_requests",
    500: "internal_error",
    503: "unavailable",
    507: "storage_full",
}
"""Codes of problems that have none of their own, by status."""


class ProblemError(Exception):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        detail: str,
        headers: Mapping[str, str] | None = None,
        *,
        code: str | None = None,
    ) -> None:
        """Answer with a status of HTTP, one line, more headers, and a code.

        The line says what was expected, what was found and what to do. By default the code is that
        of the status.
        """
        super().__init__(detail)
        self.status = status
        self.detail = escape_for_display(detail)
        self.headers = dict(headers or {})
        self.code = code or _CODES.get(status, "request_invalid")

    @property
    def title(self) -> str:
        """The phrase of the status."""
        return HTTPStatus(self.status).phrase

    def as_dict(self) -> dict[str, object]:
        """Return the members of problem+json."""
        return {
            "type": "about:blank",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
        }


def missing(what: str, code: str = "picture_not_found") -> ProblemError:
    """Return the problem of something that is not there, or that the account may not see."""
    return ProblemError(404, what, code=code)


def withheld(what: str) -> ProblemError:
    """Return the problem of a frame or clip that `serve --blur` does not show."""
    return ProblemError(403, what, code="blurred")


def invalid(what: str, code: str) -> ProblemError:
    """Return the problem of a request that cannot be used."""
    return ProblemError(422, what, code=code)


def problem_of(error: Exception) -> ProblemError | None:
    """Return the problem that reports an error; None for a defect of the program."""
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, BusyError):
        headers = {"Retry-After": str(error.retry_after_s)}
        return ProblemError(429, str(error), headers, code="encoder_busy")
    if isinstance(error, UppersonError):
        kind = next((kind for kind in type(error).__mro__ if kind in _STATUS), None)
        return ProblemError(500 if kind is None else _STATUS[kind], str(error), code=error.code)
    return None

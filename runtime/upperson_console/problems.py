"""What goes wrong, as problem+json (RFC 9457) for programs and as a page for people.

Either says in one line what was expected, what was found and what to do; nobody gets a traceback.
"""

from collections.abc import Mapping
from http import HTTPStatus

from upperson_console.turns import BusyError
from upperson_rt.errors import (
    BackendError,
    InputError,
    IntegrityError,
    UppersonError,
    UsageError,
)
from upperson_rt.printable import printable

__all__ = ["MEDIA_TYPE", "ProblemError", "problem_of"]

MEDIA_TYPE = "application/problem+json"
_STATUS: dict[type[UppersonError], int] = {
    UsageError: 422,
    InputError: 422,
    BackendError: 503,
    IntegrityError: 503,
}


class ProblemError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        """Answer with a status, one line that says what is wrong, and perhaps more headers."""
        super().__init__(detail)
        self.status = status
        self.detail = printable(detail)
        self.headers = dict(headers or {})

    @property
    def title(self) -> str:
        """The words of the status."""
        return HTTPStatus(self.status).phrase

    def as_dict(self) -> dict[str, object]:
        """Return the members of problem+json."""
        return {
            "type": "about:blank",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }


def problem_of(error: Exception) -> ProblemError | None:
    """Return what an error is to whoever asked; None for a defect of the program."""
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, BusyError):
        return ProblemError(429, str(error), {"Retry-After": str(error.retry_after_s)})
    if isinstance(error, UppersonError):
        kind = next((kind for kind in type(error).__mro__ if kind in _STATUS), None)
        return ProblemError(500 if kind is None else _STATUS[kind], str(error))
    return None

"""Rows of ``upperson-rt doctor``: what was found, and what to do about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from upperson_rt.errors import BackendError, UppersonError
from upperson_rt.printable import one_line

__all__ = ["OPTIONAL", "Check", "fail_from_error", "failed", "ok", "warning"]


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    """What was found."""
    fix: str = ""
    """What to do about it; empty where the detail already says so."""
    exit_code: int = 0
    """For the command line; not 0 exactly for ``fail``."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What was found as plain values for programs, such as ``version``."""


OPTIONAL = "not installed (optional)"
"""How a package is listed that some installations do without."""


def ok(name: str, detail: str, **facts: Any) -> Check:
    """Return a row of something that is as it should be."""
    return Check(name, "ok", detail, facts=facts)


def warning(name: str, detail: str, fix: str, **facts: Any) -> Check:
    """Return a row of something to change that stops nothing."""
    return Check(name, "warn", detail, fix, facts=facts)


def failed(name: str, detail: str, fix: str) -> Check:
    """Return a row that ends the command with the exit code of a missing backend."""
    return Check(name, "fail", detail, fix, BackendError.exit_code)


def fail_from_error(name: str, error: UppersonError) -> Check:
    """Return a row for an error, with its exit code."""
    return Check(name, "fail", one_line(error), exit_code=error.exit_code)

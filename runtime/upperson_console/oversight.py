"""Oversight of searches: purposes, case numbers, and sentences that are refused.

An administrator turns each part on in a YAML file (``serve --oversight``), read when the server
starts. Without a file nothing is asked for.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, TypeAlias
from urllib.parse import quote, unquote

from upperson_console.problems import ProblemError
from upperson_console.refused_sentences import (
    Phrases,
    built_in_phrases,
    extra_phrases,
    found_in,
)
from upperson_rt.errors import InputError
from upperson_rt.files import read_bounded
from upperson_rt.printable import safe_repr, visible_text
from upperson_rt.strict import Constraint, read_fields
from upperson_settings.yaml_file import parse_yaml

PURPOSE_COOKIE = "upperson_purpose"
Approved: TypeAlias = Literal["export", "delete", "alert"]
"""Actions that may require a second person."""
_MOST_FILE_BYTES = 1 << 20
_LONGEST = 200
_Hours: TypeAlias = Annotated[
    float, Constraint(lambda hours: 0 < hours <= 8760, "hours, above 0 and up to 8760")
]


@dataclass(frozen=True, kw_only=True)
class Context:
    """What lines of the query log say of a request beside its account."""

    address: str | None = None
    """Of the client."""
    purpose: str | None = None
    case: str | None = None
    approval: str | None = None
    """Id of the request for approval that a second person granted."""
    approved_by: str | None = None


@dataclass(frozen=True, kw_only=True)
class Stated:
    """A purpose and a case number."""

    purpose: str | None = None
    case: str | None = None


@dataclass(frozen=True, kw_only=True)
class RefusedSentences:
    """Which sentences are refused."""

    built_in: bool = True
    """Whether the list of this program holds."""
    extra: tuple[str, ...] = ()
    """Further phrases."""


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Oversight:
    """The content of the file."""

    purposes: tuple[str, ...] = ()
    """Purposes to choose from; without any, none is asked for."""
    case_number: Literal["required", "optional", "none"] = "none"
    case_pattern: Annotated[str, Constraint(_is_pattern, "a regular expression")] = r"[\w./-]{1,64}"
    accounts: Mapping[str, Stated] = field(default_factory=dict)
    """By name of an account, such as a program: a fixed purpose and case number."""
    two_persons: tuple[Approved, ...] = ()
    """Actions that a second person approves."""
    approvals_expire_hours: _Hours = 24.0
    refused_sentences: RefusedSentences | None = None

    @property
    def asks_purpose(self) -> bool:
        """Whether users state a purpose or a case number."""
        return bool(self.purposes) or self.case_number != "none"

    def context(
        self, user: str, address: str | None, headers: Mapping[str, str], cookie: str | None
    ) -> Context:
        """Return the context of a request.

        The purpose is that of the file, of the headers, or of a browser's cookie, in this order.
        """
        if not self.asks_purpose:
            return Context(address=address)
        stated = self.accounts.get(user)
        if stated is None and any(name in headers for name in _HEADERS):
            stated = Stated(**{_HEADERS[n]: _read(headers[n]) for n in _HEADERS if n in headers})
        elif stated is None and cookie is not None:
            purpose, _, case = cookie.partition("|")
            stated = Stated(purpose=_read(purpose), case=_read(case))
        stated = stated or Stated()
        return Context(address=address, purpose=stated.purpose, case=stated.case)

    def lacks(self, stated: Context | Stated) -> dict[str, str]:
        """Return what is expected instead of a purpose and a case number that do not fit."""
        lacks: dict[str, str] = {}
        case = stated.case or ""
        if self.purposes and stated.purpose not in self.purposes:
            lacks["purpose"] = f"a purpose, one of {', '.join(self.purposes)}"
        is_needed = self.case_number == "required" or (self.case_number == "optional" and case)
        if is_needed and not re.fullmatch(self.case_pattern, case):
            lacks["case number"] = f"a case number that matches {self.case_pattern}"
        return lacks

    def require_purpose(self, stated: Context) -> None:
        """Raise a ProblemError unless a purpose and a case number are stated as the file asks."""
        if lacks := self.lacks(stated):
            how = "choose them at /purpose, or send the headers Upperson-Purpose and Upperson-Case"
            what = f"state {' and '.join(lacks.values())}: {how}"
            raise ProblemError(403, what, code="purpose_missing")

    @cached_property
    def phrases(self) -> Phrases:
        """Phrases that a sentence may not have."""
        chosen = self.refused_sentences
        if chosen is None:
            return []
        return [*(built_in_phrases() if chosen.built_in else ()), *extra_phrases(chosen.extra)]

    def require_allowed(self, sentence: str) -> None:
        """Raise a ProblemError for a sentence that may not be asked."""
        if (found := found_in(sentence, self.phrases)) is not None:
            category, words = found
            what = "things that this site excludes" if category == "extra" else f"{category}"
            raise ProblemError(
                422,
                f"the sentence has words about {what}, {safe_repr(words)}: describe "
                "clothes and things that the person carries",
                code="sentence_refused",
                fields={"category": category, "words": words},
            )


_HEADERS = {"upperson-purpose": "purpose", "upperson-case": "case"}


def read_oversight(path: Path) -> Oversight:
    """Read the file; raises InputError with the key (``at``) if it is malformed."""
    content = parse_yaml(read_bounded(path, _MOST_FILE_BYTES), path)
    found = read_fields(Oversight, content, str(path))
    for name, stated in found.accounts.items():
        if lacks := found.lacks(stated):
            at = f"accounts.{name}"
            what = f"{path}: {at}: expected {' and '.join(lacks.values())}"
            raise InputError(what, code="purpose_missing", at=at)
    return found


def cookie_of(purpose: str, case: str) -> str:
    """Return the value of the cookie that states a purpose and a case number."""
    return "|".join(quote(one, safe="") for one in (purpose, case))


def _read(text: str) -> str | None:
    return visible_text(unquote(text))[:_LONGEST] or None

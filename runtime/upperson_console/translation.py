"""Texts and numbers of the pages, in the language of one account.

Texts come from the gettext catalogues in ``locale``. What programs report (errors, notices,
verdicts, states) is translated by its code. The API, the logs and the command line stay English.
"""

import gettext as catalogues
import zoneinfo
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import tzinfo
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from upperson_rt.printable import escape_for_display

LANGUAGES = {"en": "English", "de": "Deutsch", "fr": "Fran\u00e7ais"}
"""Names of the languages, by their codes."""
DOMAIN = "console"
FOLDER = Path(__file__).parent / "locale"
_MOST_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Locale:
    """Language and time zone of a reader."""

    language: str = "en"
    zone: tzinfo | None = None
    """None for that of the server."""

    @classmethod
    def of(cls, language: str, zone: str, accepted: str) -> "Locale":
        """Return what an account chose; without a language that of an Accept-Language header."""
        chosen = language if language in LANGUAGES else _preferred(accepted)
        return cls(language=chosen, zone=zone_of(zone))


LOCALE: ContextVar[Callable[[], Locale]] = ContextVar("LOCALE", default=Locale)
"""Returns the locale of the reader whose request this thread or task works on."""


def reader() -> Locale:
    """Return the locale of the reader."""
    return LOCALE.get()()


def _preferred(accepted: str) -> str:
    """Return the language that an Accept-Language header prefers; English if it has none."""
    weights: dict[str, float] = {}
    for one in accepted[:1000].split(","):
        tag, _, weight = one.partition(";")
        language = tag.strip().lower().partition("-")[0]
        try:
            share = float(weight.strip().removeprefix("q=") or 1)
        except ValueError:
            continue
        if language in LANGUAGES and share > weights.get(language, 0.0):
            weights[language] = share
    return max(weights, key=lambda language: weights[language], default="en")


@cache
def zones() -> list[str]:
    """Return the names of the known time zones."""
    return sorted(one for one in zoneinfo.available_timezones() if "/" in one or one == "UTC")


def zone_of(name: str) -> tzinfo | None:
    """Return a time zone; None, the server's, for an empty or unknown name."""
    return zoneinfo.ZoneInfo(name) if name and name in zones() else None


@cache
def catalogue(language: str) -> catalogues.NullTranslations:
    """Return the texts of a language."""
    return catalogues.translation(DOMAIN, FOLDER, [language], fallback=True)


def _texts() -> catalogues.NullTranslations:
    return catalogue(reader().language)


def gettext(text: str, /, **values: Any) -> str:
    """Return a text of the program in the reader's language, with values for its ``%(name)s``."""
    found = _texts().gettext(text)
    return found % values if values else found


def ngettext(one: str, many: str, num: int, /, **values: Any) -> str:
    """Return a text that counts ``%(num)s``, see `gettext`."""
    return _texts().ngettext(one, many, num) % {"num": number(num), **values}


def word(kind: str, code: str) -> str:
    """Return the word of a code, such as a role or a state; the code itself in English."""
    return _texts().pgettext(kind, code)


def by_code(kind: str, code: str, fields: Mapping[str, Any], english: str) -> str:
    """Return what the program reports by a code with fields, else its English text, so marked."""
    found = _texts().pgettext(kind, code)
    try:
        if found != code:
            return found % {name: _shown(value) for name, value in fields.items()}
    except (LookupError, ValueError):  # Its fields are others.
        pass
    shown = escape_for_display(english)
    return shown if reader().language == "en" else Markup('<span lang="en">{}</span>').format(shown)


def _shown(value: Any) -> str:
    """Return the value of a field."""
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, list | tuple):
        named = ", ".join(str(one) for one in value[:_MOST_NAMED])
        return named if len(value) <= _MOST_NAMED else f"{named}, \u2026"
    return str(value)


def sentence(text: str) -> str:
    """Return what the program reports as a sentence, with a capital and a full stop."""
    if isinstance(text, Markup) or not text:
        return text
    return f"{text[:1].upper()}{text[1:]}{'' if text[-1] in '.?' else '.'}"


def number(value: float, form: str = ",") -> str:
    """Return a number in a format, with the separators of the language."""
    marks = _texts().pgettext("separators of thousands and decimals", ",.")
    return f"{value:{form}}".translate({ord(","): marks[0], ord("."): marks[1]})

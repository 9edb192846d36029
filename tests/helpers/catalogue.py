"""Catalogues of the console's languages: which texts the pages have, and their translations.

Write the catalogues again after a change of texts, translate what is missing, and write them again:

    python -m tests.helpers.catalogue
"""

import ast
import inspect
import io
import re
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, get_args, get_type_hints

from babel.messages import Catalog
from babel.messages.extract import extract_python
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po
from jinja2.ext import babel_extract

import upperson_alerts.alerts
import upperson_alerts.promise
import upperson_console
import upperson_rt.image_file
from upperson_alerts.alerts import AlertReport
from upperson_console import problems
from upperson_console.accounts import ROLES
from upperson_console.approvals import Approval
from upperson_console.live import Process
from upperson_console.log_view import ACTIONS
from upperson_console.oversight import Approved
from upperson_console.rendering import script_keys
from upperson_console.translation import DOMAIN, FOLDER, LANGUAGES
from upperson_rt.score_calibration import MatchLabel
from upperson_rt.search.notices import NoticeCode
from upperson_rt.search.verdict import Reason, VerdictWord

SOURCES = Path(upperson_console.__file__).parent
TRANSLATED = [language for language in LANGUAGES if language != "en"]
FORMATS = {
    "colon": [": "],
    "format of times": ["%Y-%m-%d %H:%M:%S"],
    "separators of thousands and decimals": [",."],
}
_WORDS = {
    "account state": ["active", "expired"],
    "alert state": get_args(get_type_hints(AlertReport)["state"]),
    "approval state": get_args(inspect.signature(Approval.state.fget).return_annotation),
    "approved action": get_args(Approved),
    "log action": [*ACTIONS, "damaged"],
    "match": [label for label in get_args(MatchLabel) if label],
    "message label": ["confirmed", "dismissed"],
    "period": ["a day", "a week", "a month", "a year"],
    "process state": [*get_args(get_type_hints(Process)["state"]), "stopped"],
    "review reason": ["cap", "collecting", "demoted", "uncalibrated"],
    "role": ROLES,
    "stated": ["purpose", "case number"],
    "verdict": get_args(VerdictWord),
}
"""Codes that pages show as words, by their contexts."""
_KEYWORDS = {"_": None, "gettext": None, "ngettext": (1, 2)}
_NO_PAGES = ("cli.py", "evidence_check.py", "server.py")
"""Ends of the names of modules that have no part in pages."""
_CORE = [upperson_alerts.alerts, upperson_alerts.promise, upperson_rt.image_file]
"""Modules whose errors pages report."""
_ALSO = (
    "bin_files", "clips_not_removed", "crop_altered", "disk_read_only", "frame_not_kept",
    "gallery_busy", "gallery_closed", "gallery_damaged", "gallery_not_found",
    "gallery_of_other_model", "key_taken", "log_unwritable", "no_name", "outbox_unsupported",
    "picture_not_found", "picture_not_kept", "server_away", "timestamp_unavailable",
)  # fmt: skip
"""Further codes, which are raised outside of the console or not written as such."""
_ENGLISH = {
    "credential_not_found", "credentials_empty", "credentials_of_other_kind",
    "credentials_unreadable", "data_url_malformed", "internal_error", "json_not_utf8",
    "json_text_too_long", "json_too_deep", "json_too_large", "range_unsatisfiable",
    "request_invalid", "several_ranges", "unavailable", "user_state_damaged",
    "watch_source_invalid",
}  # fmt: skip
"""Codes of faults that only programs or administrators cause or fix; pages show them in English,
and mark them so."""


def problem_fields() -> dict[str, set[str]]:
    """Return the codes of errors that pages may report, with the fields that each has."""
    paths = [one for one in SOURCES.glob("*.py") if not one.name.endswith(_NO_PAGES)]
    paths += [Path(str(one.__file__)) for one in _CORE]
    found: dict[str, set[str]] = {code: set() for code in (*problems._CODES.values(), *_ALSO)}
    for path in paths:
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(call, ast.Call) and "Notice" not in ast.unparse(call.func):
                for code in _codes(call):
                    fields = {str(one.arg) for one in call.keywords} - {"code", "None", "fields"}
                    for one in call.keywords:
                        if one.arg == "fields" and isinstance(one.value, ast.Dict):
                            fields |= {ast.literal_eval(key) for key in one.value.keys if key}
                    found[code] = found[code] & fields if code in found else fields
    for code in ("encoder_busy", "too_many_requests", "view_quota_exceeded"):
        found[code] |= {"wait"}  # Of the header Retry-After.
    return {code: fields for code, fields in found.items() if code not in _ENGLISH}


def _codes(call: ast.Call) -> Iterator[str]:
    given = [one.value for one in call.keywords if one.arg == "code"]
    if ast.unparse(call.func) in ("invalid", "missing"):
        given += call.args[1:2]
    for value in given:
        for part in (value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield part.value


def template() -> Catalog:
    """Return the texts of the program, without translations."""
    found = Catalog()
    for path in sorted([*SOURCES.glob("*.py"), *(SOURCES / "templates").iterdir()]):
        extract: Any = {".py": extract_python, ".j2": babel_extract}.get(path.suffix)
        if extract is None:
            continue
        options = {"silent": "false"} if path.suffix == ".j2" else {}
        content = io.BytesIO(path.read_bytes())
        for _, function, texts, _ in extract(content, _KEYWORDS, (), options):
            given = [texts] if isinstance(texts, str) else [*filter(None, texts or ())]
            if given and function in _KEYWORDS:
                found.add(tuple(given[:2]) if function == "ngettext" else given[0])
    for key in script_keys():
        found.add(key)
    coded = {**FORMATS, **_WORDS, "notice": get_args(NoticeCode), "reason": get_args(Reason)}
    for context, codes in {**coded, "problem": sorted(problem_fields())}.items():
        for code in codes:
            found.add(code, context=context)
    return found


def path_of(language: str, suffix: str = ".po") -> Path:
    """Return the path of a catalogue, or with the suffix ``.mo`` of its compiled file."""
    return FOLDER / language / "LC_MESSAGES" / f"{DOMAIN}{suffix}"


def read_catalogue(language: str) -> Catalog:
    path = path_of(language)
    content = path.read_text("utf-8") if path.exists() else ""
    return read_po(io.StringIO(content), locale=language)


def compiled(catalogue: Catalog) -> bytes:
    file = io.BytesIO()
    write_mo(file, catalogue)
    return file.getvalue()


def main() -> None:
    for language in TRANSLATED:
        catalogue = read_catalogue(language)
        catalogue.update(template(), no_fuzzy_matching=True)
        catalogue.obsolete.clear()
        catalogue.header_comment = f"# Texts of the console: {LANGUAGES[language]}."
        catalogue.project, catalogue.version, catalogue.fuzzy = DOMAIN, "1", False
        catalogue.creation_date = datetime(
            2026, 1, 1, tzinfo=timezone.utc
        )  # The same texts make the same files.
        path = path_of(language)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            write_po(file, catalogue, width=100)
        path.with_suffix(".mo").write_bytes(compiled(catalogue))
        for message in catalogue:
            if message.id and not all(flat(message.string)):
                print(f"{language}: {message.context or ''} {message.id!r}", file=sys.stderr)


def flat(text: str | list[str] | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the forms of a text, of which a plain one has one."""
    return (text or "",) if text is None or isinstance(text, str) else tuple(text)


def placeholders(text: str) -> list[str]:
    return sorted(re.findall(r"%\((\w+)\)s", text))


if __name__ == "__main__":
    main()

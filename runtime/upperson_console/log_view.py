"""Lines of the query log for the page Records: newest first, filtered, page by page.

A page reads the files backwards from a byte offset, and a bounded part of them, so that a log of
months takes no longer than one of a day. Offsets count all files of the log as one, the oldest
first.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import IO, Annotated, Any, TypeAlias
from urllib.parse import urlencode

from fastapi import Query

from upperson_console.times import local_time, read_time, utc_text
from upperson_console.translation import reader
from upperson_log.chain import open_log
from upperson_rt.errors import InputError
from upperson_rt.printable import safe_repr
from upperson_rt.strict import parse_json

_ACCOUNTS = ("change", "create", "renew", "revoke")
_ALERTS = ("add", "confirm", "dismiss", "pause", "remove", "resume", "test")
ACTIONS = (
    *(f"account-{one}" for one in _ACCOUNTS),
    *(f"alert-{one}" for one in _ALERTS),
    *(f"approval-{one}" for one in ("approve", "ask", "refuse")),
    *("acknowledge", "alike", "bin", "break", "browse", "delete", "export", "forbidden"),
    *("log-export", "login", "login-failed", "logout", "mark", "prune", "query", "quota"),
    *("restore", "rotate", "timeline", "unblur", "view"),
)
"""What lines of the log name as their action."""
_LINES = 50
_TIMES = ("since", "until")
_Text: TypeAlias = Annotated[str, Query(max_length=200)]
_LONGEST_IDS = 2000
_BLOCK_BYTES = 256 << 10
_MOST_BYTES = 16 << 20
"""Read for one page, where few lines pass a filter."""


@dataclass(frozen=True, kw_only=True)
class LogFilter:
    """Conditions on lines of the log; empty ones hold for all."""

    user: _Text = ""
    action: _Text = ""
    case: _Text = ""
    picture: Annotated[str, Query(max_length=_LONGEST_IDS)] = ""
    """Ids, separated by spaces: lines that have one of them."""
    since: _Text = ""
    """ISO 8601, the reader's time if it has no offset, as `until`."""
    until: _Text = ""

    def __post_init__(self) -> None:
        self._span  # noqa: B018 - Malformed times are refused here.

    @cached_property
    def _span(self) -> tuple[float, float]:
        zone = reader().zone
        since = read_time(self.since or None, "from", zone)
        until = read_time(self.until or None, "to", zone, is_end=True)
        return -math.inf if since is None else since, math.inf if until is None else until

    @property
    def times(self) -> dict[str, float | None]:
        """``since`` and ``until`` in unix seconds; None for any."""
        return {n: None if math.isinf(s) else s for n, s in zip(_TIMES, self._span, strict=True)}

    @property
    def address(self) -> str:
        """The query string of these conditions."""
        given = {name: value for name, value in asdict(self).items() if value}
        times = {name: utc_text(time) for name, time in self.times.items() if time is not None}
        return urlencode(given | times)

    def passes(self, entry: dict[str, Any]) -> bool:
        """Return whether a line passes; raises LookupError or ValueError for a damaged one."""
        since, until = self._span
        named = {*self.picture.split()}
        return (
            self.user in ("", entry["user"])
            and self.action in ("", entry["action"])
            and self.case in ("", entry.get("case"))
            and (not self.picture or not named.isdisjoint(map(str, entry.get("ids", []))))
            and since <= _time_of(entry) <= until
        )


@dataclass(frozen=True)
class LogLine:
    """A line of the log, as the page shows it."""

    time: str
    user: str
    action: str
    query: str
    count: int
    context: str = ""
    """Address of the client, purpose, case number and second person."""


_DAMAGED = (
    KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError, InputError
)  # fmt: skip
_CONTEXT = ("address", "purpose", "case", "approved_by")


def read_page(
    path: Path, where: LogFilter, before: int | None = None
) -> tuple[list[LogLine], int | None]:
    """Return lines that pass a filter, newest first, and where older ones end; None at the start.

    ``before`` is the byte offset that the page before returned. Damaged lines pass an empty filter.
    """
    found: list[LogLine] = []
    with open_log(path) as log:
        begin = log.total_bytes
        top = begin if before is None else min(before, begin)
        for file, size in log.opened(newest_first=True):
            begin -= size
            for start, line in _backwards(file, min(size, top - begin)):
                if (shown := _shown(line, where)) is not None:
                    found.append(shown)
                if len(found) == _LINES or top - begin - start > _MOST_BYTES:
                    return found, begin + start or None
    return found, None


def passing_lines(path: Path, where: LogFilter) -> Iterator[bytes]:
    """Yield the lines that pass a filter as they stand in the files, oldest first."""
    with open_log(path) as log:
        for file, _ in log.opened():
            for line in file:
                if _shown(line, where) is not None:
                    yield line


def _backwards(file: IO[bytes], end: int) -> Iterator[tuple[int, bytes]]:
    """Yield each line before an offset with its own offset, last first."""
    rest = b""
    while end > 0:
        start = max(0, end - _BLOCK_BYTES)
        file.seek(start)
        first, *lines = (file.read(end - start) + rest).split(b"\n")
        place = start + len(first) + sum(len(line) + 1 for line in lines)
        for line in reversed(lines):
            place -= len(line)
            if line:
                yield place, line
            place -= 1
        rest, end = first, start
    if rest:
        yield 0, rest


def _shown(line: bytes, where: LogFilter) -> LogLine | None:
    text = line.decode("ascii", "replace")
    try:
        entry = parse_json(text, "a line of the log")
        if not where.passes(entry):
            return None
        details = entry.get("details") or {}
        shown = (f"{name} {_detail(name, value)}" for name, value in details.items() if value)
        query = entry.get("sentence") or ", ".join(shown)
        context = " · ".join(str(entry[name]) for name in _CONTEXT if entry.get(name))
        user, action, when = str(entry["user"]), str(entry["action"]), local_time(_time_of(entry))
        return LogLine(when, user, action, str(query)[:200], len(entry.get("ids", [])), context)
    except _DAMAGED:
        return None if where.address else LogLine("", "", "damaged", safe_repr(text), 0)


def _detail(name: str, value: Any) -> str:
    if name in ("deleted_before", "expires", "older_than"):
        return local_time(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _time_of(entry: dict[str, Any]) -> float:
    return datetime.fromisoformat(str(entry["time"])).timestamp()

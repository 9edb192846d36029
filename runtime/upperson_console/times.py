"""Times of the pages, shown and typed in the reader's time zone."""

import time
from datetime import datetime, timedelta, timezone, tzinfo

from upperson_console.translation import gettext, ngettext, reader, word
from upperson_rt.errors import UsageError
from upperson_rt.printable import safe_repr

_CALENDAR_S = -62_135_596_800.0, 253_402_300_799.0
"""The years 1 to 9999, in unix seconds."""


def local_time(seconds: float | None, form: str | None = None) -> str:
    """Return unix seconds as the reader's time; seconds if no calendar reaches them.

    By default with its offset if the reader's clock shows this time twice.
    """
    if seconds is None:
        return ""
    try:
        moment = datetime.fromtimestamp(seconds, reader().zone)
    except (OverflowError, OSError, ValueError):
        return f"{seconds:g} s"
    if form is not None:
        return moment.strftime(form)
    text = moment.strftime(word("format of times", "%Y-%m-%d %H:%M:%S"))
    return f"{text} {_offset(moment)}" if is_twice(seconds) else text


def zone_name(has_offset: bool = True) -> str:
    """Return the reader's time zone, by default with its present offset."""
    zone = reader().zone
    name = gettext("the server's time") if zone is None else str(zone)
    if not has_offset:
        return name
    return f"{name}, UTC{_offset(datetime.now(zone))}"


def _offset(moment: datetime) -> str:
    offset = moment.astimezone(reader().zone).strftime("%z")
    return f"{offset[:3]}:{offset[3:5]}"


def period(first: float | None, last: float | None) -> str:
    """Return ``2026-11-26 06:05:13 \u2013 06:05:19``; the day twice only if it differs."""
    begin, end = local_time(first), local_time(last)
    if begin == end:
        return begin
    day, _, clock = end.partition(" ")
    return f"{begin} \u2013 {clock if begin.startswith(f'{day} ') else end}"


def age(seconds: float | None) -> str:
    """Return the age of a time in its largest unit."""
    if seconds is None:
        return gettext("never")
    passed = time.time() - seconds
    if passed >= 86400:
        return ngettext("%(num)s day ago", "%(num)s days ago", int(passed / 86400))
    if passed >= 3600:
        return ngettext("%(num)s hour ago", "%(num)s hours ago", int(passed / 3600))
    if passed >= 60:
        return ngettext("%(num)s minute ago", "%(num)s minutes ago", int(passed / 60))
    return gettext("just now") if passed > -60 else gettext("in the future")


# --- Times that a reader types


def read_time(
    text: str | None, what: str, zone: tzinfo | None = None, is_end: bool = False
) -> float | None:
    """Read an ISO 8601 time, of a zone (the server's for None) if it has no offset.

    Of a local time that exists twice, the first is taken, for the end of a period the second.

    Returns:
        Unix seconds; None for None.

    Raises:
        UsageError: It is malformed, or clocks skip it (``time_skipped``).
    """
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
        if moment.tzinfo is not None:
            return moment.timestamp()
        moment = moment.replace(tzinfo=zone, fold=int(is_end))
        seconds = moment.timestamp()
        is_skipped = abs(datetime.fromtimestamp(seconds, zone) - moment) > timedelta(seconds=1)
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(
            f"'{what}' must be a time such as 2026-11-24T14:00, found {safe_repr(text)}",
            code="time_malformed",
            field=what,
        ) from error
    if is_skipped:
        raise UsageError(
            f"'{what}' is a time that clocks skip on that day, {safe_repr(text)}: an hour earlier "
            "or later exists",
            code="time_skipped",
            field=what,
        )
    return seconds


def is_twice(seconds: float | None) -> bool:
    """Return whether the reader's clock shows a time twice, as summer time ends."""
    try:
        moment = datetime.fromtimestamp(seconds or 0.0, reader().zone)
        return moment.replace(fold=0).timestamp() != moment.replace(fold=1).timestamp()
    except (OverflowError, OSError, ValueError):
        return False


def iso_text(text: str) -> str:
    """Return an ISO 8601 time with an offset as the reader's time, with its offset."""
    form = "milliseconds" if "." in text else "seconds"
    try:
        return datetime.fromisoformat(text).astimezone(reader().zone).isoformat(timespec=form)
    except (OverflowError, OSError, ValueError):  # At the ends of the calendar.
        return text


def utc_text(seconds: float | None) -> str | None:
    """Return unix seconds as ISO 8601 in UTC, for addresses, which other accounts may open."""
    if seconds is None:
        return None
    seconds = min(max(seconds, _CALENDAR_S[0]), _CALENDAR_S[1])
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")

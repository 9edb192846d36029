"""What the core and the API report, as texts of the pages: errors, notices, verdicts and alerts."""

from collections.abc import Mapping
from typing import Any

from upperson_alerts.alerts import AlertReport
from upperson_alerts.promise import show_rate
from upperson_console.problems import ProblemError, problem_of
from upperson_console.translation import by_code, gettext, ngettext, number, sentence, word
from upperson_rt.printable import show_percent
from upperson_rt.search.notices import Notice


def problem_text(error: Exception) -> str:
    """Return an error as a sentence."""
    problem = problem_of(error) or ProblemError(500, str(error))
    wait = {"wait": problem.headers.get("Retry-After", "1")}
    fields = {**getattr(error, "fields", {}), **problem.fields, **wait}
    return sentence(by_code("problem", problem.code, fields, problem.detail))


def notice_text(notice: Notice) -> str:
    """Return a notice of a search as a sentence."""
    return sentence(by_code("notice", notice.code, notice.fields, notice.text))


def verdict_text(verdict: Mapping[str, Any]) -> str:
    """Return whether some picture matches, and how many do; of `Verdict.as_json`."""
    judged, english = word("verdict", verdict["word"]), verdict["text"]
    if verdict["likelihood"] is None:
        english = english.removeprefix(f"{verdict['word']}: ")
        why = by_code("reason", verdict["reason"], verdict["fields"], english)
        return f"{judged}{word('colon', ': ')}{why}"
    given = {"word": judged, "share": show_percent(verdict["likelihood"])}
    if verdict["word"] == "nobody":
        return gettext("%(word)s (%(share)s): probably no picture matches", **given)
    expected = verdict["expected_matches"]
    if expected is None or expected < 1:
        return gettext("%(word)s (%(share)s)", **given)
    if verdict["expected_is_more"]:
        return ngettext(
            "%(word)s (%(share)s): more than %(num)s picture matches",
            "%(word)s (%(share)s): more than %(num)s pictures match",
            round(expected),
            **given,
        )
    return ngettext(
        "%(word)s (%(share)s): about %(num)s picture matches",
        "%(word)s (%(share)s): about %(num)s pictures match",
        round(expected),
        **given,
    )


def rate_text(per_day: float) -> str:
    """Return the promise of an alert, a rate of false alarms."""
    count, unit = show_rate(per_day).split("/")
    return ngettext(
        "at most %(num)s false alarm %(period)s",
        "at most %(num)s false alarms %(period)s",
        1 if count == "1" else 2,
        num=number(float(count), "g"),
        period=word("period", f"a {unit}"),
    )


def alert_needs(report: AlertReport) -> str:
    """Return what the promise of an alert still needs."""
    if report.state != "collecting":
        return word("alert state", report.state)
    if report.missing is None:
        return gettext("the promise needs pictures with times")
    return ngettext(
        "the promise needs %(num)s more visit at %(rate)s a day",
        "the promise needs %(num)s more visits at %(rate)s a day",
        report.missing,
        rate=number(report.standing.per_day or 0.0, ",.0f"),
    )


def alert_record(report: AlertReport) -> str:
    """Return how many messages of an alert were dismissed, and which rate that shows."""
    parts = [number(report.dismissed) if report.dismissed else gettext("none")]
    if report.days >= 1:  # Of less, the visits of a day are only estimated.
        parts.append(gettext("in %(days)s days", days=number(report.days, ".3g")))
    if report.days >= 1 and report.upper_bound is not None:
        parts.append(gettext("below %(rate)s a day", rate=number(report.upper_bound, ".2g")))
    elif report.days >= 1 and report.dismissed_per_day:
        parts.append(gettext("%(rate)s a day", rate=number(report.dismissed_per_day, ".2g")))
    if report.unjudged:
        parts.append(gettext("%(count)s not judged", count=number(report.unjudged)))
    return ", ".join(parts)

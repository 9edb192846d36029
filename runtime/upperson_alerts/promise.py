"""What an alert promises, and whether it keeps that: rates, thresholds, a test on false alarms."""

import math
import re
from collections.abc import Mapping

from upperson_rt.errors import UsageError
from upperson_rt.printable import safe_repr

DEMOTE_AT = 20.0
"""Evidence against the promise, an e-value, at which an alert is demoted: if it keeps its promise,
that happens with a probability of 1 in 20 at most, however often one looks."""
_UNIT_DAYS = {"hour": 1 / 24, "day": 1.0, "week": 7.0, "month": 30.0, "year": 365.0}
_MOST_PER_DAY = 10_000.0
_LEAST_PER_DAY = 1 / 3650
_RARELY, _MANY = 1e-4, 500.0
_MOST_P = 0.05
"""Where few visits come a day, a lax promise would raise half of them."""


def read_rate(text: str) -> float:
    """Read a rate such as ``1/day`` or ``2/week``; return alarms per day.

    Raises:
        UsageError: It is no rate, zero, or out of range.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)/(hour|day|week|month|year)", text.strip().lower())
    if match is None:
        raise UsageError(
            f"a rate must be a number and a period, such as 1/day or 2/week, found "
            f"{safe_repr(text)}",
            code="rate_malformed",
            found=text,
        )
    rate = float(match[1]) / _UNIT_DAYS[match[2]]
    if rate == 0:
        raise UsageError(
            "an alert with no false alarm at all cannot be promised: the lower the rate, the more "
            "pictures it needs; name one above 0, such as 1/week",
            code="rate_zero",
        )
    if not _LEAST_PER_DAY <= rate <= _MOST_PER_DAY:
        raise UsageError(
            f"a rate must lie between one in ten years and {_MOST_PER_DAY:,.0f}/day, found "
            f"{safe_repr(text)}",
            code="rate_out_of_range",
            found=text,
        )
    return rate


def show_rate(per_day: float) -> str:
    """Return a rate as `read_rate` reads it."""
    for unit in ("day", "week", "month"):
        if per_day * _UNIT_DAYS[unit] >= 0.995:
            return f"{per_day * _UNIT_DAYS[unit]:.3g}/{unit}"
    return f"{per_day * _UNIT_DAYS['year']:.3g}/year"


def describe_rate(per_day: float) -> str:
    """Return a rate as an upper limit in words, such as ``at most 1 false alarm a day``."""
    count, unit = show_rate(per_day).split("/")
    return f"at most {count} false alarm{'s' * (count != '1')} a {unit}"


def visits_per_day(hours: Mapping[int, int], untimed: int = 0) -> float | None:
    """Estimate how many visits a day has, from their number in each hour since 1970.

    The typical visit's day counts: half of all visits lie on days that are as busy or busier. So
    visits whose clock has jumped, each on a day of its own, change nothing. Of less than a day the
    hours are scaled up.

    Returns:
        None where no visit has a time.
    """
    timed = sum(hours.values())
    if not timed:
        return None
    days: dict[int, int] = {}
    for hour, count in hours.items():
        days[hour // 24] = days.get(hour // 24, 0) + count
    busy, so_far = 0, 0
    for busy in sorted(days.values(), reverse=True):
        so_far += busy
        if 2 * so_far >= timed:
            break
    scaled = timed * 24 / len(hours) if len(hours) < 24 else 0.0
    return max(float(busy), scaled) * (timed + untimed) / timed


def allowed_p(per_day: float, visits_a_day: float) -> float:
    """Return the p-value up to which visits are raised: the share that may be false alarms."""
    return min(_MOST_P, per_day / visits_a_day)


def required_visits(p: float) -> int:
    """Return how many background visits a p-value needs."""
    return math.ceil(round(1 / p, 6))


def e_value(false_alarms: int, expected: float) -> float:
    """Return the evidence that alarms are more frequent than promised.

    A mixture of the likelihood ratios of all higher rates, with exponential (gamma) weights: for a
    rate of up to the promised one its expectation is 1 at most, at any time one chooses to look.

    Args:
        false_alarms: So far.
        expected: So far at most, as promised.
    """
    n, weight = false_alarms, math.log1p(max(0.0, expected))
    terms = [math.lgamma(n + 1) - math.lgamma(n - k + 1) - (k + 1) * weight for k in range(n + 1)]
    largest = max(terms)
    total = largest + math.log(math.fsum(math.exp(term - largest) for term in terms))
    return math.exp(min(total, 700.0))


def most_by_chance(expected: float) -> int:
    """Return the number that a Poisson count of this mean exceeds once in 10,000 times at most."""
    if expected > _MANY:
        return math.ceil(expected + 4 * math.sqrt(expected))
    term = so_far = math.exp(-expected)
    count = 0
    while 1 - so_far > _RARELY:
        count += 1
        term *= expected / count
        so_far += term
    return count


def upper_bound(false_alarms: int, days: float) -> float | None:
    """Return the rate a day that none in so many days excludes at 95 %: 3 / days.

    None if there were false alarms, or no days.
    """
    return 3.0 / days if not false_alarms and days > 0 else None

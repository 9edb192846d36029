"""Rates, thresholds and the test on dismissed alerts, against exact probabilities."""

import math

import numpy as np
import pytest

from tests.helpers.refused import refused
from upperson_alerts.promise import (
    DEMOTE_AT,
    allowed_p,
    e_value,
    read_rate,
    required_visits,
    show_rate,
    upper_bound,
    visits_per_day,
)
from upperson_rt.errors import UsageError


def test_rates():
    for text, per_day in (("0.1/day", 0.1), ("2/week", 2 / 7), ("3/month", 0.1), ("1/hour", 24)):
        assert read_rate(text) == pytest.approx(per_day)
        assert read_rate(show_rate(per_day)) == pytest.approx(per_day, rel=0.01)
    for text, code in (
        ("0.0/week", "rate_zero"), ("1", "rate_malformed"), ("-1/day", "rate_malformed"),
        ("nan/day", "rate_malformed"), ("99999/hour", "rate_out_of_range"),
        ("0.0001/year", "rate_out_of_range"),
    ):  # fmt: skip
        with refused(code, UsageError):
            read_rate(text)


def test_the_example_of_two_thousand_tracks_a_day():
    p = allowed_p(0.1, 2000)
    assert p == pytest.approx(5e-5)
    assert required_visits(p) == 20_000
    assert upper_bound(0, 30) == pytest.approx(0.1)
    assert upper_bound(1, 30) is upper_bound(0, 0) is None


def test_visits_a_day_of_even_busy_and_short_galleries():
    even = dict.fromkeys(range(24 * 10), 100)
    assert visits_per_day(even) == 2400
    assert visits_per_day(even, untimed=24_000) == 4800
    assert visits_per_day({}) is visits_per_day({}, untimed=7) is None
    assert visits_per_day({5: 100, 6: 100}) == 2400  # Of two hours: twelve times as many.
    weekend = {24 * day + 12: (20 if day % 7 > 4 else 1000) for day in range(70)}
    assert visits_per_day(weekend) == 1000
    half = dict.fromkeys(range(24), 100) | {24 * day: 100 for day in range(1, 25)}
    assert visits_per_day(half) == 2400


def test_a_clock_that_jumps_changes_no_threshold():
    hours = dict.fromkeys(range(24 * 10), 100)
    for far in (-(10**9) // 3600, 10**11 // 3600):
        jumped = hours | {far + 24 * number: 1 for number in range(3000)}
        assert visits_per_day(jumped) == 2400
        assert visits_per_day({**hours, far: 3000}) <= 3000


def poisson(mean, count):
    return math.exp(count * math.log(mean) - mean - math.lgamma(count + 1))


@pytest.mark.parametrize("mean", [0.01, 3.0, 20.0])
def test_the_e_value_expects_one_at_most_where_the_promise_is_kept(mean):
    for true in (mean, 0.5 * mean):
        expected = sum(poisson(true, n) * e_value(n, mean) for n in range(400))
        assert expected <= 1 + 1e-6
        if true == mean:
            assert expected == pytest.approx(1, abs=1e-6)
    more = np.linspace(0, 60, 200_001)
    for n in (0, 1, 7):
        ratios = np.exp(n * np.log1p(more) - more * mean - more)
        mixture = ((ratios[1:] + ratios[:-1]) / 2 * np.diff(more)).sum()
        assert e_value(n, mean) == pytest.approx(mixture, rel=1e-5)


def test_broken_promises_are_demoted_soon():
    assert e_value(30, 10.0) > DEMOTE_AT  # Three a day where one was promised, in ten days.
    assert e_value(10, 10.0) < 1
    assert e_value(100_000, 1.0) >= 1e300

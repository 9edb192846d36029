import pytest

from upperson_rt.backends.autotune import Timing, time_in_turns


def test_percentiles_are_interpolated_and_rates_follow_the_median():
    timing = Timing(seconds=[0.4, 0.1, 0.2, 0.3], cpu_seconds=[0.5, 0.1, 0.1, 0.3])
    assert timing.median_s == pytest.approx(0.25)
    assert timing.percentile_s(90) == pytest.approx(0.37)
    assert timing.median_cpu_s == pytest.approx(0.2)
    found = timing.as_dict(items=8)
    assert found["runs"] == 4
    assert found["p50_ms"] == pytest.approx(250)
    assert found["p50_ms"] < found["p90_ms"] < found["p99_ms"] < 400
    assert found["items_per_s"] == pytest.approx(32)
    assert found["cpu_ms"] == pytest.approx(200)


def test_one_run_is_every_percentile_and_processor_time_may_be_unknown():
    found = Timing(seconds=[0.2], cpu_seconds=[0.1]).as_dict(items=1)
    assert found["p50_ms"] == found["p90_ms"] == found["p99_ms"] == pytest.approx(200)
    timings = time_in_turns({"a": lambda: None}, warmup=0, rounds=2, cpu_clock=None)
    assert timings["a"].as_dict()["cpu_ms"] is None
    clock = iter((1.0, 3.5, 10.0, 12.5))
    timings = time_in_turns({"a": lambda: None}, warmup=0, rounds=2, cpu_clock=lambda: next(clock))
    assert timings["a"].cpu_seconds == [2.5, 2.5]


def test_contenders_take_turns_and_every_round_begins_with_the_next():
    order: list[str] = []
    rounds: list[int] = []
    timings = time_in_turns(
        {name: lambda name=name: order.append(name) for name in "abc"},
        warmup=1,
        rounds=3,
        progress=rounds.append,
    )
    assert "".join(order) == "abcbcacababc"
    assert rounds == [1, 2, 3, 4]
    assert list(timings) == ["a", "b", "c"]
    for timing in timings.values():
        assert len(timing.seconds) == len(timing.cpu_seconds) == 3


def test_more_rounds_until_the_time_is_up_and_warm_up_does_not_count():
    now = 0.0

    def take_a_second():
        nonlocal now
        now += 1.0

    timings = time_in_turns(
        {"a": take_a_second, "b": take_a_second}, warmup=2, rounds=1, seconds=7.0, clock=lambda: now
    )
    assert timings["a"].seconds == [1.0] * 4
    assert now == 2 * 2 + 4 * 2

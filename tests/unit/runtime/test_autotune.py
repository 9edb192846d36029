"""What `auto` takes: on fakes whose speed is set and whose clock is ours, then once for real."""

import json
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from upperson_autotune.autotuner import Autotuner
from upperson_autotune.timing import time_in_turns
from upperson_rt import machine
from upperson_rt.bundle import Bundle
from upperson_rt.errors import BackendError, IntegrityError
from upperson_rt.machine import Processor


class Clock:
    """Time that passes only when a fake computes; ``share`` is that of the processor it gets."""

    def __init__(self, share=1.0):
        self.now, self.cpu, self.share = 0.0, 0.0, share

    def work(self, seconds):
        self.cpu += seconds
        self.now += seconds / self.share


class Fake:
    """A backend that takes a set time for a row, and passes its golden samples or does not."""

    version, device, max_batch = "1", "cpu", None

    def __init__(self, clock, name, row_s, sound=True, fails_at=None):
        self.name, self._clock, self._row_s = name, clock, row_s
        self._sound, self._fails_at = sound, fails_at
        self.ran = []

    def run(self, inputs):
        ((name, rows),) = inputs.items()
        if len(rows) == self._fails_at:
            raise BackendError(f"{self.name} fails at {len(rows)}")
        self.ran.append(len(rows))
        self._clock.work(len(rows) * self._row_s)
        output = "image_embeds" if name == "image" else "text_embeds"
        return {output: np.zeros((len(rows), 2), np.float32)}

    def check(self):
        if not self._sound:
            raise IntegrityError(f"{self.name} computes wrongly")
        return f"checks of {self.name}"


class Ring:
    """Backends ``a`` and ``b``, and what was loaded of them."""

    def __init__(self, a=0.002, b=0.001, *, share=1.0, **b_is):
        self.clock, self.loaded = Clock(share), []
        self.made = {"a": Fake(self.clock, "a", a), "b": Fake(self.clock, "b", b, **b_is)}

    def load(self, name):
        self.loaded.append(name)
        if isinstance(self.made[name], Exception):
            raise self.made[name]
        return self.made[name]

    def tuner(self, tower="image", **changes):
        fields = {
            "names": tuple(self.made),
            "tower": tower,
            "graph_sha256": "ab" * 32,
            "threads": 1,
            "inputs": np.zeros((3, 2, 2, 3), np.uint8),
            "load": self.load,
            "check": lambda backend: backend.check(),
            "clock": lambda: self.clock.now,
            "cpu_clock": lambda: self.clock.cpu,
        }
        return Autotuner(**fields | changes)

    def decide(self, **changes):
        """Return the name of the backend that is taken, and why."""
        backend, _, choice = self.tuner(**changes).decide()
        return backend.name, choice


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UPPERSON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "backends"


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "upperson_rt")
    return lambda: [record.getMessage() for record in caplog.records]


def test_the_fastest_is_taken_and_kept(cache, warnings):
    ring = Ring()
    backend, checks, choice = ring.tuner().decide()
    assert (backend.name, checks) == ("b", "checks of b")
    assert choice.why.startswith("auto: b 8.0 ms, a 16 ms for 8 pictures, measured 20")
    assert choice.file.parent == cache
    assert cache.stat().st_mode & 0o777 == 0o700
    assert set(ring.made["b"].ran) == {1, 8}, "one picture, then a camera's batch"

    again = Ring(a=0.0001)  # Not measured any more.
    assert again.decide() == ("b", choice)
    assert (again.loaded, again.made["b"].ran, warnings()) == (["b"], [], [])

    assert Ring(sound=False).decide()[0] == "a", "it does not run any more"
    assert warnings() == [
        "b was the fastest for the image tower and does not run any more: b computes wrongly",
        "b is left out for the image tower: b computes wrongly",
    ]
    assert Ring().decide()[1].measurement.chosen == "a", "that is kept"


def test_runs_take_a_second_or_two_and_on_a_slow_processor_single_pictures():
    ring = Ring(a=0.05, b=0.03)
    assert ring.decide()[1].measurement.pictures == 8
    assert 1.0 < ring.clock.now < 3.5
    slow = Ring(a=0.45, b=0.44)
    found = slow.decide(graph_sha256="cd" * 32)[1].measurement
    assert (found.pictures, found.chosen) == (1, "b")
    assert "b 440 ms, a 450 ms for a picture" in str(found)
    assert slow.clock.now < 4


def test_on_a_busy_machine_processor_time_decides():
    ring = Ring()
    work = ring.clock.work

    def disturbed(seconds):  # Others have the processor most of the time, just then when b runs.
        work(seconds)
        ring.clock.now += 9 * seconds if seconds in (0.001, 0.008) else 0

    ring.clock.work = disturbed
    _, choice = ring.decide()
    assert choice.measurement.busy
    assert "b 8.0 ms, a 16 ms of processor time for 8 pictures" in choice.why
    # Threads that share the work are no disturbance.
    shared = Ring(share=2.0).decide(graph_sha256="cd" * 32)
    assert not shared[1].measurement.busy


@pytest.mark.parametrize(
    ("b_is", "problem", "timed"),
    [
        ({"sound": False}, "b computes wrongly", ["b", "a"]),
        ({"fails_at": 8}, "b fails at 8", ["a"]),
        ({"fails_at": 1}, "b fails at 1", ["a"]),
    ],
)
def test_what_fails_is_left_out(warnings, b_is, problem, timed):
    name, choice = Ring(**b_is).decide()
    assert name == "a"
    assert warnings() == [f"b is left out for the image tower: {problem}"]
    assert choice.measurement.left_out == {"b": problem}
    assert list(choice.measurement.milliseconds) == timed
    again = Ring(**b_is)
    name, known = again.decide()
    assert (name, again.loaded) == ("a", ["a"])
    assert known.why.endswith("; b left out")


def test_where_all_fail_the_first_ones_error_is_raised_and_nothing_is_kept(cache):
    ring = Ring()
    ring.made["a"] = Fake(ring.clock, "a", 0.002, sound=False)
    ring.made["b"] = BackendError("b does not load")
    for first in (IntegrityError("a computes wrongly"), BackendError("a does not load")):
        with pytest.raises(type(first), match=str(first)):
            ring.decide()
        ring.made["a"] = BackendError("a does not load")
    assert list(cache.glob("*.json")) == []


@pytest.mark.parametrize(
    ("changed", "changes"),
    [
        ({"processor": lambda: Processor(machine.processor().name, frozenset({"avx2"}))}, {}),
        ({"__version__": "99"}, {}),
        ({"os.sched_getaffinity": lambda pid: {7}}, {}),
        ({}, {"graph_sha256": "cd" * 32}),
        ({}, {"threads": 2}),
    ],
)
def test_other_conditions_are_measured_afresh(monkeypatch, changed, changes, warnings):
    Ring().decide()
    for name, value in changed.items():
        monkeypatch.setattr(f"upperson_autotune.autotuner.{name}", value, raising=False)
    assert Ring(a=0.0001).decide(**changes)[0] == "a"
    assert warnings() == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "",
        lambda content: content | {"chosen": "c"},
        lambda content: content | {"left_out": {"b": "x"}},
        lambda content: content | {"milliseconds": {"b": 0}},
        lambda content: content | {"chosen": "c", "milliseconds": {"c": 1.0}},
        lambda content: json.dumps(content) + " " * (1 << 20),
        lambda content: content | {"conditions": content["conditions"] | {"threads": 7}},
    ],
)
def test_a_file_of_no_use_is_measured_afresh_and_replaced(damage, warnings):
    file = Ring().decide()[1].file
    damaged = damage(json.loads(file.read_text()))
    file.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
    assert Ring(a=0.0001).tuner().known() is None
    assert Ring(a=0.0001).decide()[0] == "a"
    assert len(warnings()) == 2, "once a call"
    assert all(str(file) in message for message in warnings())
    assert json.loads(file.read_text())["chosen"] == "a"
    assert Ring().decide()[0] == "a"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_waited_for(make, warnings):
    file = Ring().decide()[1].file
    file.unlink()
    make(file)
    assert Ring().decide()[0] == "b"
    assert all("delete it" in message or "not kept" in message for message in warnings())
    assert warnings()


def test_without_a_cache_each_process_measures(tmp_path, monkeypatch, warnings):
    (tmp_path / "file").touch()
    monkeypatch.setenv("UPPERSON_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        ring = Ring()
        name, choice = ring.decide()
        assert (name, set(ring.loaded), choice.file) == ("b", {"a", "b"}, None)
        assert choice.problem in warnings()[-1]
    assert sum("is not kept" in message for message in warnings()) == 2


def test_of_several_at_once_one_measures():
    rings = [Ring() for _ in range(4)]
    together = threading.Barrier(len(rings))

    def decide(ring):
        together.wait()
        return ring.decide()[0]

    with ThreadPoolExecutor(len(rings)) as pool:
        assert set(pool.map(decide, rings)) == {"b"}
    assert sorted(len(ring.loaded) for ring in rings) == [1, 1, 1, 2]


def test_a_text_tower_is_measured_by_what_a_query_waits_for():
    ring = Ring()

    def load(name):
        ring.clock.now += {"a": 0.3, "b": 0.9}[name]
        return ring.load(name)

    tuner = ring.tuner("text", load=load, inputs=np.zeros((3, 5), np.int32))
    assert tuner.known() is None
    _, _, choice = tuner.decide()
    assert choice.measurement.chosen == "a"
    assert "a 302 ms, b 901 ms to load and embed a sentence" in choice.why
    assert ring.made["a"].ran == ring.made["b"].ran == [1]
    backend, _, known = tuner.known()
    assert (backend.name, known) == ("a", choice)


def test_contenders_take_turns_and_every_round_begins_with_the_next():
    order, rounds = [], []
    turns = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = time_in_turns(turns, warmup=1, rounds=3, progress=rounds.append)
    assert "".join(order) == "abcbcacababc"
    assert rounds == [1, 2, 3, 4]
    assert {len(timing.seconds) for timing in timings.values()} == {3}
    # More rounds until the time is up, and warming up does not count.
    clock = Clock()
    timings = time_in_turns(
        dict.fromkeys("ab", lambda: clock.work(1.0)),
        warmup=2,
        rounds=1,
        seconds=7.0,
        clock=lambda: clock.now,
    )
    assert timings["a"].seconds == [1.0] * 4
    assert clock.now == 2 * 2 + 4 * 2


# For real: never a word about which one is faster.


@pytest.fixture
def bundle(toy_bundle):
    for name in ("onnxruntime", "openvino"):
        pytest.importorskip(name)
    return lambda **options: Bundle.open(toy_bundle, threads=1, **options)


def test_a_bundle_measures_its_image_tower_once(bundle, cache):
    first = bundle()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 24, 8, 3), np.uint8)
    embeds = first.encoder().encode_pixels(pixels)
    choice = first.choice("image")
    assert set(choice.measurement.milliseconds) == {"onnxruntime", "openvino"}
    assert choice.measurement.left_out == {}
    assert first.backend("image").name == choice.measurement.chosen
    assert [file.name for file in cache.glob("*.json")] == [choice.file.name]
    again, named = bundle(), bundle(backend=choice.measurement.chosen)
    for one in (again, named):
        np.testing.assert_array_equal(one.encoder().encode_pixels(pixels), embeds)
    assert again.choice("image") == choice
    assert named.choice("image").why == "as asked for"


def test_a_query_alone_measures_nothing_but_uses_what_is_known(bundle, cache):
    first = bundle()
    first.encoder().encode_texts(["red"])
    assert first.choice("text").why == "auto: the first one installed"
    for named in (bundle(backend="onnxruntime"), bundle(verify=False)):
        assert named.backend("image").name == first.backend("text").name == "onnxruntime"
    assert not cache.exists()
    bundle().check_golden_samples()
    assert len(list(cache.glob("text-*.json"))) == 1
    assert "to load and embed a sentence" in bundle().choice("text").why

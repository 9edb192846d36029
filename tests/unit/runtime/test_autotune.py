"""What `auto` takes: on fakes whose speed is set and whose clock is ours, then once for real."""

import json
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.helpers.refused import refused
from tests.helpers.toy_bundle import make_toy_bundle, replace_in_bundle
from upperson_rt import backends, machine
from upperson_rt.backends import autotune
from upperson_rt.backends.autotune import Autotuner, Conditions
from upperson_rt.bundle import Bundle
from upperson_rt.errors import BackendError, IntegrityError
from upperson_rt.machine import Processor

INPUTS = np.zeros((3, 2, 2, 3), np.uint8)


class Clock:
    """Time that passes only when a fake computes."""

    def __init__(self, share=1.0):
        self.now, self.cpu, self.share = 0.0, 0.0, share

    def work(self, seconds):
        self.cpu += seconds
        self.now += seconds / self.share


class Fake:
    """A backend that takes a set time for a row, and passes its golden samples or does not."""

    version, device, max_batch = "1", "cpu", None

    def __init__(self, clock, name, row_s, sound=True, fails_at=None, share=1.0):
        self.name, self._clock, self._row_s, self._share = name, clock, row_s, share
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

    def __init__(self, clock=None, load_s=0.0, **made):
        self.clock = clock or Clock()
        self.made, self.load_s, self.loaded = made, load_s, []

    def load(self, name):
        self.loaded.append(name)
        made = self.made[name]
        if isinstance(made, Exception):
            raise made
        return made

    def tuner(self, tower="image", names=None, **changes):
        fields = {
            "names": tuple(names or self.made),
            "tower": tower,
            "graph_sha256": "ab" * 32,
            "threads": 1,
            "inputs": INPUTS,
            "load": self.load,
            "check": lambda backend: backend.check(),
            "clock": lambda: self.clock.now,
            "cpu_clock": lambda: self.clock.cpu,
        }
        return Autotuner(**fields | changes)


def ring_of(a=0.002, b=0.001, *, clock=None, **more):
    clock = clock or Clock()
    made = {"a": Fake(clock, "a", a, **more.get("a_is", {}))}
    made["b"] = Fake(clock, "b", b, **more.get("b_is", {}))
    return Ring(clock, **made)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UPPERSON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "backends"


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "upperson_rt")
    return lambda: [record.getMessage() for record in caplog.records]


def test_the_fastest_is_taken_and_kept(cache, warnings):
    ring = ring_of()
    backend, checks, choice = ring.tuner().decide()
    assert (backend.name, checks) == ("b", "checks of b")
    assert choice.why.startswith("auto: b 8.0 ms, a 16 ms for 8 pictures, measured 20")
    assert choice.file.parent == cache
    assert cache.stat().st_mode & 0o777 == 0o700
    assert set(ring.made["b"].ran) == {1, 8}, "one picture, then a camera's batch"

    again = ring_of(a=0.0001)  # Not asked any more.
    backend, checks, known = again.tuner().decide()
    assert (backend.name, checks, again.loaded) == ("b", "checks of b", ["b"])
    assert again.made["b"].ran == []
    assert known == choice
    assert warnings() == []


def test_runs_take_a_second_or_two_and_on_a_slow_processor_single_pictures():
    ring = ring_of(a=0.05, b=0.03)
    assert ring.tuner().decide()[2].measurement.pictures == 8
    assert 1.0 < ring.clock.now < 3.5
    slow = ring_of(a=0.45, b=0.44)
    found = slow.tuner(graph_sha256="cd" * 32).decide()[2].measurement
    assert (found.pictures, found.chosen) == (1, "b")
    assert "b 440 ms, a 450 ms for a picture" in str(found)
    assert slow.clock.now < 4


def test_on_a_busy_machine_processor_time_decides():
    clock = Clock()
    ring = ring_of(a=0.002, b=0.001, clock=clock)
    work = clock.work

    def disturbed(seconds):  # Others have the processor most of the time, just then when b runs.
        work(seconds)
        clock.now += 9 * seconds if seconds in (0.001, 0.008) else 0

    clock.work = disturbed
    _, _, choice = ring.tuner().decide()
    assert choice.measurement.busy
    assert "b 8.0 ms, a 16 ms of processor time for 8 pictures" in choice.why


def test_threads_that_share_the_work_are_no_disturbance():
    ring = ring_of(clock=Clock(share=2.0))
    assert not ring.tuner().decide()[2].measurement.busy


def test_what_fails_its_golden_samples_is_left_out(warnings):
    ring = ring_of(b_is={"sound": False})
    backend, _, choice = ring.tuner().decide()
    assert backend.name == "a"
    assert warnings() == ["b is left out for the image tower: b computes wrongly"]
    assert choice.measurement.left_out == {"b": "b computes wrongly"}
    assert list(choice.measurement.milliseconds) == ["b", "a"]
    again = ring_of(b_is={"sound": False})
    backend, _, known = again.tuner().decide()
    assert (backend.name, again.loaded) == ("a", ["a"])
    assert known.why.endswith("; b left out")


def test_what_does_not_load_or_run_is_left_out(warnings):
    ring = ring_of()
    ring.made["b"] = BackendError("b does not load")
    assert ring.tuner().decide()[0].name == "a"
    ring = ring_of(b_is={"fails_at": 8})
    assert ring.tuner(graph_sha256="cd" * 32).decide()[0].name == "a"
    assert warnings() == [
        "b is left out for the image tower: b does not load",
        "b is left out for the image tower: b fails at 8",
    ]


def test_where_all_fail_the_first_ones_error_is_raised_and_nothing_is_kept(cache):
    ring = ring_of(a_is={"sound": False})
    ring.made["b"] = BackendError("b does not load")
    for first in (IntegrityError("a computes wrongly"), BackendError("a does not load")):
        with pytest.raises(type(first), match=str(first)):
            ring.tuner().decide()
        ring.made["a"] = BackendError("a does not load")
    assert list(cache.glob("*.json")) == []


def test_a_choice_that_does_not_run_any_more_is_measured_afresh(warnings):
    ring_of().tuner().decide()
    ring = ring_of(b_is={"sound": False})
    assert ring.tuner().decide()[0].name == "a"
    assert warnings() == [
        "b was the fastest for the image tower and does not run any more: b computes wrongly",
        "b is left out for the image tower: b computes wrongly",
    ]
    assert ring_of().tuner().decide()[2].measurement.chosen == "a", "that is kept"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("processor", lambda: Processor("Other", frozenset())),
        ("processor", lambda: Processor(machine.processor().name, frozenset({"avx2"}))),
        ("__version__", "99"),
        ("version_of", lambda name: "99"),
        ("os.sched_getaffinity", lambda pid: {7}),
    ],
)
def test_another_machine_or_version_is_measured_afresh(monkeypatch, name, value, warnings):
    ring_of().tuner().decide()
    monkeypatch.setattr(f"upperson_rt.backends.autotune.{name}", value, raising=False)
    assert ring_of(a=0.0001).tuner().decide()[0].name == "a"
    assert warnings() == []


def test_another_graph_number_of_threads_or_set_of_libraries_is_measured_afresh():
    ring_of().tuner().decide()
    for changes in (
        {"graph_sha256": "cd" * 32},
        {"threads": 2},
        {"threads": None},
        {"names": ("a",)},
    ):
        assert ring_of(a=0.0001).tuner(**changes).decide()[0].name == "a"


def test_a_container_of_another_share_is_measured_afresh(tmp_path, monkeypatch):
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(autotune, "_QUOTAS", (quota,))
    found = []
    for text in ("", "max 100000\n", "200000 100000\n"):
        quota.write_text(text)
        found.append(Conditions.here("ab", "image", "ab" * 32, None).quota)
    assert found == ["unknown", "max 100000", "200000 100000"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "",
        lambda content: json.dumps(content)[:-40],
        lambda content: "[]",
        lambda content: json.dumps(content | {"schema_version": 2}),
        lambda content: json.dumps(content | {"more": 1}),
        lambda content: json.dumps(content | {"chosen": "c"}),
        lambda content: json.dumps(content | {"left_out": {"b": "x"}}),
        lambda content: json.dumps(content | {"milliseconds": {"b": 0}}),
        lambda content: json.dumps(content | {"chosen": "c", "milliseconds": {"c": 1.0}}),
        lambda content: json.dumps(content) + " " * (1 << 20),
        lambda content: '{"a":' * 90_000,
        lambda content: json.dumps(content | {"measured": 9 * 10**400}),
        lambda content: json.dumps(
            content | {"conditions": content["conditions"] | {"threads": 7}}
        ),
    ],
)
def test_a_file_of_no_use_is_measured_afresh_and_replaced(damage, warnings):
    file = ring_of().tuner().decide()[2].file
    file.write_text(damage(json.loads(file.read_text())))
    assert ring_of(a=0.0001).tuner().known() is None
    assert ring_of(a=0.0001).tuner().decide()[0].name == "a"
    assert len(warnings()) == 2, "once a call"
    assert all(str(file) in message for message in warnings())
    assert json.loads(file.read_text())["chosen"] == "a"
    assert ring_of().tuner().decide()[0].name == "a"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_waited_for(make, warnings):
    file = ring_of().tuner().decide()[2].file
    file.unlink()
    make(file)
    assert ring_of().tuner().decide()[0].name == "b"
    assert all("delete it" in message or "not kept" in message for message in warnings())
    assert warnings()


def test_a_cache_that_cannot_be_written_is_a_note(tmp_path, monkeypatch, warnings):
    (tmp_path / "file").touch()
    monkeypatch.setenv("UPPERSON_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        ring = ring_of()
        backend, _, choice = ring.tuner().decide()
        assert (backend.name, set(ring.loaded)) == ("b", {"a", "b"})
        assert choice.file is None
        assert choice.problem.startswith(f"cannot write {tmp_path}/file/backends/image-")
    note = "a measurement is not kept, and made again next time: cannot write "
    assert all(message.startswith(note) for message in warnings())
    assert len(warnings()) == 2


def test_a_cache_that_can_only_be_read_is_used(cache, monkeypatch, warnings):
    ring_of().tuner().decide()

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(autotune.os, "open", refuse)
    monkeypatch.setattr(autotune, "write_atomically", refuse)
    assert ring_of(a=0.0001).tuner().decide()[0].name == "b"
    assert warnings() == []


def test_a_user_without_a_home_measures_each_time(monkeypatch, warnings):
    monkeypatch.delenv("UPPERSON_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("upperson_rt.files.Path.home", nowhere)
    backend, _, choice = ring_of().tuner().decide()
    assert (backend.name, choice.file) == ("b", None)
    assert "set $UPPERSON_CACHE" in choice.problem
    assert any("made again next time: there is no home folder" in text for text in warnings())


def test_of_several_at_once_one_measures():
    rings = [ring_of() for _ in range(4)]
    together = threading.Barrier(len(rings))

    def decide(ring):
        together.wait()
        return ring.tuner().decide()[0].name

    with ThreadPoolExecutor(len(rings)) as pool:
        assert set(pool.map(decide, rings)) == {"b"}
    assert sorted(len(ring.loaded) for ring in rings) == [1, 1, 1, 2]


def test_a_text_tower_is_measured_by_what_a_query_waits_for():
    clock = Clock()
    made = {"a": Fake(clock, "a", 0.002), "b": Fake(clock, "b", 0.001)}
    ring = Ring(clock, **made)

    def load(name):
        clock.now += {"a": 0.3, "b": 0.9}[name]
        return ring.load(name)

    tuner = ring.tuner("text", load=load, inputs=np.zeros((3, 5), np.int32))
    assert tuner.known() is None
    _, _, choice = tuner.decide()
    assert choice.measurement.chosen == "a"
    assert "a 302 ms, b 901 ms to load and embed a sentence" in choice.why
    assert made["a"].ran == made["b"].ran == [1]
    backend, _, known = tuner.known()
    assert (backend.name, known) == ("a", choice)


# For real: never a word about which one is faster.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for name in ("onnxruntime", "openvino"):
        pytest.importorskip(name)
    return make_toy_bundle(tmp_path_factory.mktemp("fastest") / "bundle")


def test_a_bundle_measures_its_image_tower_once(folder, cache):
    bundle = Bundle.open(folder, threads=1)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 24, 8, 3), np.uint8)
    embeds = bundle.encoder().encode_pixels(pixels)
    choice = bundle.choice("image")
    assert set(choice.measurement.milliseconds) == {"onnxruntime", "openvino"}
    assert choice.measurement.left_out == {}
    assert bundle.backend("image").name == choice.measurement.chosen
    assert [file.name for file in cache.glob("*.json")] == [choice.file.name]
    again = Bundle.open(folder, threads=1)
    np.testing.assert_array_equal(again.encoder().encode_pixels(pixels), embeds)
    assert again.choice("image") == choice
    named = Bundle.open(folder, backend=choice.measurement.chosen, threads=1)
    np.testing.assert_array_equal(named.encoder().encode_pixels(pixels), embeds)
    assert named.choice("image").why == "as asked for"


def test_a_query_alone_measures_nothing_but_uses_what_is_known(folder, cache):
    bundle = Bundle.open(folder, threads=1)
    bundle.encoder().encode_texts(["red"])
    assert bundle.choice("text").why == "auto: the first one installed"
    assert bundle.backend("text").name == "onnxruntime"
    assert not cache.exists()
    Bundle.open(folder, threads=1).check_golden_samples()
    assert len(list(cache.glob("text-*.json"))) == 1
    known = Bundle.open(folder, threads=1).choice("text")
    assert "to load and embed a sentence" in known.why


def test_a_named_backend_or_an_unchecked_bundle_measures_nothing(folder, cache):
    for bundle in (
        Bundle.open(folder, backend="onnxruntime", threads=1),
        Bundle.open(folder, threads=1, verify=False),
    ):
        assert bundle.backend("image").name == "onnxruntime"
    assert not cache.exists()


def test_a_library_that_was_removed_leaves_the_other(folder, cache, monkeypatch):
    Bundle.open(folder, threads=1).backend("image")
    found = backends.find_spec
    for gone, left in (("openvino", "onnxruntime"), ("onnxruntime", "openvino")):
        monkeypatch.setattr(backends, "find_spec", lambda name, gone=gone: name != gone or None)
        bundle = Bundle.open(folder, threads=1)
        assert bundle.backend("image").name == left
        assert bundle.choice("image").why == "auto: the only one installed"
    monkeypatch.setattr(backends, "find_spec", found)


def test_a_bundle_that_no_backend_computes_right_is_an_error(folder, tmp_path, cache):
    broken = make_toy_bundle(tmp_path / "bundle")
    other = make_toy_bundle(tmp_path / "other", seed=5)
    replace_in_bundle(broken, "image.int8.onnx", (other / "image.int8.onnx").read_bytes())
    with refused("embeds_differ", IntegrityError, tower="image", batch_size=1):
        Bundle.open(broken, threads=1).backend("image")
    assert list(cache.glob("*.json")) == []


def test_other_devices_keep_their_order(folder, monkeypatch):
    monkeypatch.setattr("upperson_rt.bundle.require_device", lambda backend, device: None)
    bundle = Bundle.open(folder, device="cuda", threads=1)
    asked = []
    monkeypatch.setattr(
        bundle, "_load", lambda tower, name: asked.append(name) or pytest.fail("loaded")
    )
    monkeypatch.setattr(backends, "find_spec", lambda name: name)
    with pytest.raises(pytest.fail.Exception):
        bundle.backend("image")
    assert asked == ["tensorrt"]

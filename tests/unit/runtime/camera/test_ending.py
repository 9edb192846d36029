"""The end of a pipeline whose parts are stuck, or want to end the program."""

import random
import threading
from contextlib import suppress
from functools import partial

import pytest

from tests.helpers.fake_camera import (
    ALL,
    BOX,
    FILE,
    LIVE,
    PATIENT,
    START,
    WANTS_TO_END,
    FakeEncoder,
    FakeOpener,
    Gate,
    UnspeakableError,
    person_frame,
    pictures_of,
    started,
    submit,
    wait_for,
)
from tests.helpers.refused import refused
from upperson_camera import CaptureRules, Pipeline
from upperson_camera.prometheus import MetricsFile
from upperson_rt.errors import BackendError, InputError, UppersonError, UsageError
from upperson_rt.gallery import Filter

LIMIT_S = 1000


@pytest.fixture(autouse=True)
def all_threads_end():
    """Wait at the end, or when it is called, until no thread of a pipeline is left."""
    known = set(threading.enumerate())

    def wait():
        wait_for(lambda: set(threading.enumerate()) <= known)

    yield wait
    wait()


@pytest.mark.parametrize("hangs", [False, True])
def test_a_detector_has_its_own_time_and_one_that_hangs_is_abandoned_alone(
    encoder, gallery, patience, hangs, all_threads_end, caplog
):
    first, second, calls, errors = Gate(), Gate(), [], []

    def detector(frame):
        calls.append(frame)
        (first if len(calls) == 1 else second).hold()
        return [BOX]

    pipeline = Pipeline(encoder, gallery, end_within_s=LIMIT_S, **ALL)
    pipeline.start()
    with first, second:
        pipeline.add_camera("gate", detector=detector)
        pipeline.add_camera("door")
        for number in range(4):
            assert pipeline.submit("gate", person_frame(), time=START + number)
            assert pipeline.submit("door", person_frame(), [BOX], START + number)
        wait_for(lambda: first.entered == 1)
        wait_for(lambda: pipeline.stats().cameras["door"].committed == 4)
        stopping = threading.Thread(target=lambda: errors.append(pipeline.stop()))
        stopping.start()
        wait_for(lambda: pipeline._cameras["gate"]._frames.closed)  # By what stopped it.
        patience.more_s += 0.9 * LIMIT_S
        first.open()
        wait_for(lambda: second.entered == 1)
        patience.more_s += 0.2 * LIMIT_S
        wait_for(lambda: pipeline.stats().cameras["gate"].frames_dropped == {"stopped": 2})
        if hangs:
            wait_for(lambda: pipeline.stats().cameras["gate"].committed == 1)
            patience.more_s += LIMIT_S
        else:
            second.open()
        stopping.join()
        stats = pipeline.stats()
        gate, door = stats.cameras["gate"], stats.cameras["door"]
        stuck = {"detector_stuck": 1} if hangs else {}
        assert (gate.failures, gate.frames_dropped) == (stuck, {"stopped": 2} | stuck)
        assert gate.state == ("failed" if hangs else "stopped")
        assert gate.committed == gate.frames_processed == (1 if hangs else 2)
        assert (door.state, door.failures) == ("stopped", {})
        assert door.committed == gallery.count(Filter(camera="door")) == 4
        assert (stats.stuck, stats.failures) == (hangs, {})
        failed = [record.camera for record in caplog.records if record.event == "failed"]
        assert failed == ["gate"] * hangs
    all_threads_end()
    assert pipeline.stats().cameras == stats.cameras, "what comes back has no effect"
    assert (len(calls), errors) == (2, [None])


def test_cameras_that_wait_for_a_stuck_detector_are_abandoned_with_it(
    encoder, gallery, all_threads_end
):
    gate = Gate()

    def detector(frame):
        gate.hold()
        return [BOX]

    with gate:
        with Pipeline(encoder, gallery, end_within_s=0.2) as pipeline:
            for name in ("a", "b", "c"):
                pipeline.add_camera(name, detector=detector)
                pipeline.submit(name, person_frame())
            wait_for(lambda: sum(pipeline.stats().frame_queues.values()) == 0)
        cameras = pipeline.stats().cameras.values()
        assert [c.failures for c in cameras] == [{"detector_stuck": 1}] * 3
    all_threads_end()
    assert gate.entered == 1, "it is called no more once the end has passed"


@pytest.mark.parametrize(
    ("where", "kind"),
    [("encoder", BackendError), ("gallery", InputError), ("on_commit", UppersonError)],
)
def test_what_all_cameras_share_is_abandoned_when_it_is_stuck(
    encoder, gallery, patience, where, kind, tmp_path, monkeypatch, all_threads_end
):
    gate, notified, held, ended, add = Gate(), [], [], [], gallery.add

    def notify(items):
        notified.append(items)
        if where == "on_commit":
            held.extend(items)
            gate.hold()

    def hang(items, *more):
        held.extend(items)
        gate.hold()
        return add(items, *more)

    if where == "gallery":
        monkeypatch.setattr(gallery, "add", hang)
    used = FakeEncoder(encoder, gate) if where == "encoder" else encoder
    limits = {"batch_size": 2, "max_delay_s": LIMIT_S, "end_within_s": LIMIT_S}
    pipeline = started(used, gallery, on_commit=notify, **limits)

    def stop():
        with refused(f"{where}_stuck", kind):
            pipeline.stop()
        ended.append(where)

    with gate:
        submit(pipeline, 20)
        wait_for(lambda: gate.entered == 1)
        stopping = threading.Thread(target=stop)
        stopping.start()
        # Four batches wait for what hangs, and the encoder has the next one in its hands.
        embedded = 0 if where == "encoder" else min(20, len(held) + 4 * 2 + 2)
        wait_for(lambda: pipeline.stats().cameras["gate"].embedded == embedded)
        wait_for(lambda: pipeline.stats().cameras["gate"].state == "stopped")
        assert stopping.is_alive()
        patience.more_s += LIMIT_S + 1
        stopping.join()
        assert ended == [where]
        stats = pipeline.stats()
        assert stats.failures == {f"{where}_stuck": 1}
        assert stats.stuck
        MetricsFile(pipeline, tmp_path / "a.prom").close()
        counted = f'upperson_failures_total{{camera="",reason="{where}_stuck"}} 1.0'
        assert counted in (tmp_path / "a.prom").read_text().splitlines()
        camera = stats.cameras["gate"]
        assert camera.accepted == 20
        if where == "on_commit":
            assert camera.committed == gallery.count() == 20, "only the callback gets no more"
        else:
            assert camera.crops_dropped == {"failed": 20}
        assert len(notified) == (where == "on_commit")
    all_threads_end()
    assert pipeline.stats().cameras == stats.cameras, "what comes back has no effect"
    assert len(notified) == (where == "on_commit")
    assert gallery.verify() == []


def test_a_slow_encoder_is_waited_for_as_long_as_it_works(encoder, gallery, patience):
    class Slow(FakeEncoder):
        def encode_pixels(self, pixels, batch_size):
            patience.more_s += 0.9 * LIMIT_S
            return encoder.encode_pixels(pixels, batch_size)

    options = {"batch_size": 4, "frame_queue": 20, "max_delay_s": 1e6, "end_within_s": LIMIT_S}
    pipeline = started(Slow(encoder), gallery, **options)
    submit(pipeline, 20)
    pipeline.stop()
    camera = pipeline.stats().cameras["gate"]
    assert camera.committed == camera.accepted == gallery.count() == 20
    assert pipeline.stats().seconds > 4 * LIMIT_S
    assert (camera.state, pipeline.stats().stuck) == ("stopped", False)
    with refused("not_running", UsageError):
        pipeline.submit("gate", person_frame(), [BOX])
    pipeline.stop()  # A second time does nothing.


@pytest.mark.parametrize("where", ["open", "read", "close"])
@pytest.mark.parametrize("source", [FILE, LIVE])
def test_a_source_that_hangs_is_abandoned(
    encoder, gallery, source, where, monkeypatch, all_threads_end
):
    monkeypatch.setattr("upperson_camera.capture._PATIENCE_S", 0.2)
    gate = Gate()

    def opener(source, timeout_s):
        if where == "open":
            gate.hold()
        script = [person_frame(), gate.hold if where == "read" else person_frame()]
        reader = FakeOpener(script)(source, timeout_s)
        if where == "close":
            reader.close = gate.hold
        return reader

    with gate:
        options = {"capture_rules": PATIENT, "end_within_s": LIMIT_S, "opener": opener}
        with Pipeline(encoder, gallery, **options, **ALL) as pipeline:
            pipeline.add_camera("gate", source, lambda frame: [BOX], start_time=START)
            wait_for(lambda: gate.entered == 1)
        stats = pipeline.stats()
        camera = stats.cameras["gate"]
        assert camera.failures == {"source_stuck": 1}
        assert camera.state == ("stopped" if source.is_live else "failed")
        assert source.shown in camera.error
        assert camera.committed == camera.accepted == camera.frames_read
        assert camera.frames_read == {"open": 0, "read": 1, "close": 2}[where]
        assert stats.stuck
    all_threads_end()
    assert pipeline.stats().cameras == stats.cameras, "what comes back has no effect"


@pytest.mark.parametrize(
    ("where", "error"),
    [("detector", SystemExit(0)), *zip(("file", "live", "open"), WANTS_TO_END, strict=True)],
    ids=str,
)
def test_what_wants_to_end_the_program_ends_its_camera(encoder, gallery, where, error):
    def detector(frame):
        if where == "detector":
            raise error
        return [BOX]

    def opener(source, timeout_s):
        if where == "open":
            raise error
        script = [person_frame()] * 3 + ([] if where == "detector" else [error])
        return FakeOpener(script)(source, timeout_s)

    with Pipeline(encoder, gallery, opener=opener, **ALL) as pipeline:
        source = LIVE if where in ("live", "open") else FILE
        pipeline.add_camera("gate", source, detector, start_time=START)
        pipeline.add_camera("door")
        wait_for(lambda: pipeline.stats().cameras["gate"].state == "failed")
        if where != "detector":
            wait_for(lambda: pipeline.stats().cameras["gate"].frames_waiting == 0)
        pipeline.submit("door", person_frame(), [BOX], START)
    stats = pipeline.stats()
    camera = stats.cameras["gate"]
    failed = "detector_error" if where == "detector" else "source_error"
    assert camera.failures == {failed: 1}
    assert type(error).__name__ in camera.error
    assert camera.committed == {"detector": 0, "open": 0}.get(where, 3)
    assert camera.frames_dropped.get("detector_error", 0) == (where == "detector")
    assert stats.cameras["door"].committed == gallery.count(Filter(camera="door")) == 1
    assert not stats.stuck


@pytest.mark.parametrize("where", ["encoder", "gallery", "on_commit"])
@pytest.mark.parametrize("error", [SystemExit(0), UnspeakableError()], ids=["exit", "unspeakable"])
def test_any_error_of_what_all_cameras_share_stops_the_pipeline(
    encoder, gallery, where, error, monkeypatch
):
    def end(*arguments):
        raise error

    raised = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    if where == "encoder":
        encoder = FakeEncoder(encoder, error=error)
    elif where == "gallery":
        monkeypatch.setattr(gallery, "add", end)
    pipeline = started(encoder, gallery, on_commit=end if where == "on_commit" else None)
    submit_one = partial(pipeline.submit, "gate", person_frame(), [BOX])
    submit_one()
    for call in (pipeline.drain, submit_one, pipeline.stop):
        if isinstance(error, Exception):
            with pytest.raises(type(error)):
                call()
        else:
            with refused(f"{where}_ended", UppersonError) as found:
                call()
            assert found.value.__cause__ is error
    stats = pipeline.stats()
    assert stats.failures == {f"{where}_error": 1}
    assert gallery.count() == stats.total("committed") == (where == "on_commit")
    assert len(pictures_of(gallery)) == (where == "on_commit")
    assert not raised, "no thread may end without a word"


@pytest.mark.parametrize(("where", "call"), [("on_commit", "stop"), ("detector", "drain")])
def test_what_works_in_a_pipeline_cannot_wait_for_it(encoder, gallery, where, call):
    errors = []

    def wait(*arguments):
        with refused("called_from_own_thread", UsageError, call=call, part=where):
            getattr(pipeline, call)()
        errors.append(call)
        return [BOX]

    on_commit = wait if where == "on_commit" else None
    with Pipeline(encoder, gallery, on_commit=on_commit, **ALL) as pipeline:
        pipeline.add_camera("gate", detector=wait if where == "detector" else lambda frame: [BOX])
        pipeline.submit("gate", person_frame())
        pipeline.drain()
    assert errors == [call]
    assert gallery.count() == 1


class Moody:
    """Works, hangs until it is released, or raises something, as its dice say."""

    def __init__(self, dice, released):
        self._dice, self._released = dice, released
        self._hangs, self._raises = dice.choice([(0, 0), (0.1, 0), (0, 0.1), (0.05, 0.05)])

    def __call__(self):
        mood = self._dice.random()
        if mood < self._hangs:
            self._released.wait()
        elif mood < self._hangs + self._raises:
            raise self._dice.choice([*WANTS_TO_END, ValueError("broken"), StopIteration()])


@pytest.mark.parametrize("seed", range(3))
def test_whatever_hangs_or_fails_all_is_counted_and_nothing_acknowledged_is_lost(
    encoder, gallery, seed, monkeypatch, all_threads_end
):
    monkeypatch.setattr("upperson_camera.capture._PATIENCE_S", 0.1)
    dice, released, notified, add = random.Random(seed), threading.Event(), [], gallery.add
    encoding, adding, notifying, detecting, reading = (Moody(dice, released) for _ in range(5))
    moody_encoder = FakeEncoder(encoder)
    moody_encoder.encode_pixels = lambda *given: encoding() or encoder.encode_pixels(*given)
    monkeypatch.setattr(gallery, "add", lambda *given: adding() or add(*given))
    pipeline = Pipeline(
        moody_encoder, gallery, on_commit=lambda items: notified.extend(items) or notifying(),
        batch_size=2, max_delay_s=0, crop_queue=dice.choice([1, 64]), end_within_s=0.2,
        save_crops=dice.random() < 0.5, **ALL,
        capture_rules=CaptureRules(stall_s=0.1, first_wait_s=0.01, longest_wait_s=0.01),
    )  # fmt: skip
    pipeline.start()
    opener = FakeOpener(*[[lambda: reading() or person_frame()] * 6] * 3)
    with suppress(Exception):  # It may have failed before, with any of those above.
        pipeline.add_camera("own", detector=lambda frame: detecting() or [BOX])
        for source in (FILE, LIVE):
            options = {"start_time": START, "opener": opener}
            pipeline.add_camera(source.kind, source, lambda frame: detecting() or [BOX], **options)
        for number in range(12):
            pipeline.submit("own", person_frame(), None, START + number)
            pipeline.drain(0.01)
    failures = {}
    try:
        pipeline.stop()
    except Exception:  # Any of those above, but never one that would end the program.
        failures = pipeline.stats().failures
        assert failures
    stats = pipeline.stats()
    assert stats.failures == failures, "what is raised is counted, and what is counted is raised"
    assert {item.key for item in notified} <= {item.key for item in gallery.items()}
    notified_before = len(notified)
    released.set()
    all_threads_end()
    assert (pipeline.stats().cameras, len(notified)) == (stats.cameras, notified_before)
    if "gallery_stuck" not in failures:  # What comes back late may have added rows.
        assert gallery.count() == stats.total("committed")
    assert gallery.verify() == []
    crops = {gallery.crops_dir / item.crop for item in gallery.items() if item.crop}
    assert set(pictures_of(gallery)) == crops

"""A gallery on a server that is away: what was accepted waits on disk, and none of it is lost."""

import re
import signal
import sqlite3
import sys
from contextlib import closing, suppress

import numpy as np
import pytest

from tests.helpers.command_line import run_code
from tests.helpers.fake_camera import (
    ALL,
    BOX,
    FILE,
    START,
    FakeOpener,
    Gate,
    person_frame,
    started,
    submit,
    wait_for,
)
from tests.helpers.refused import refused
from tests.helpers.remote_gallery import RemoteGallery, refuse
from upperson_camera import Pipeline
from upperson_camera.disk_buffer import DiskBuffer
from upperson_camera.late_gallery import LateGallery, open_now_or_later
from upperson_rt.errors import BackendError, InputError, IntegrityError, UsageError
from upperson_rt.gallery import Gallery, Item

LIMIT_S = 1000


@pytest.fixture
def remote(gallery):
    return RemoteGallery(gallery)


@pytest.fixture
def options(tmp_path):
    found = {"buffer": tmp_path / "buffer", "end_within_s": LIMIT_S, "save_crops": False}
    return found | {"frame_queue": 64, **ALL}


def test_no_accepted_crop_is_lost_however_long_the_server_is_away(
    encoder, remote, options, clock, caplog
):
    with Pipeline(encoder, remote, **options) as pipeline:
        for camera in ("gate", "hall"):
            pipeline.add_camera(camera)
            submit(pipeline, 5, camera=camera)
        assert pipeline.drain(60)
        remote.away = refuse
        for step in range(4):
            for camera in ("gate", "hall"):
                submit(pipeline, 5, 5 * (step + 1), camera)
            clock.more_s += 75
        wait_for(lambda: pipeline.stats().buffered == 40)
        stats = pipeline.stats()
        assert (stats.buffered, stats.total("committed")) == (40, 10)
        wait_for(lambda: pipeline.stats().gallery_problem is not None)
        assert stats.crop_queue == stats.commit_queue == 0, "nothing piles up in memory"
        assert stats.buffered_bytes > 0
        tries = remote.attempts
        wait_for(lambda: remote.attempts > tries)
        remote.away = None
        assert pipeline.drain(60)
        assert pipeline.stats().buffered == 0
    stats = pipeline.stats()
    assert stats.total("accepted") == stats.total("committed") == remote.count() == 50
    assert stats.dropped("crops_dropped") == {}
    assert len(remote.added) == 50, "each was sent once"
    for camera in ("gate", "hall"):
        times = [item.time for item in remote.added if item.camera == camera]
        assert times == sorted(times)
    waiting = [record.waiting for record in caplog.records if record.event == "gallery_away"]
    assert 0 < max(waiting) <= 40


def test_the_next_run_sends_what_waits_first_and_in_order(encoder, remote, options, clock, caplog):
    def later(seconds):
        clock.more_s += LIMIT_S / 4

    remote.away = refuse
    pipeline = started(encoder, remote, **options)
    submit(pipeline, 3)
    wait_for(lambda: pipeline.stats().buffered == 3)
    clock.sleep = later
    with refused("gallery_away", BackendError, waiting=3):
        pipeline.stop()
    assert pipeline.stats().failures == {"gallery_away": 1}
    assert pipeline.stats().cameras["gate"].crops_waiting == 3
    pipeline = started(encoder, remote, **options)
    submit(pipeline, 3, first=3)
    wait_for(lambda: pipeline.stats().buffered == 6)
    remote.away = None
    pipeline.stop()
    stats = pipeline.stats()
    assert (stats.recovered, stats.total("committed"), stats.buffered) == (3, 3, 0)
    assert [item.time for item in remote.added] == [START + number for number in range(6)]
    assert remote.count() == 6
    assert [r.waiting for r in caplog.records if r.event == "buffered"] == [3]
    with Pipeline(encoder, remote, **options) as pipeline:
        pass
    assert pipeline.stats().recovered == 0


def fill(buffer, variants):
    """Leave a row of each variant in a buffer, as earlier runs do."""
    buffer.open()
    for number, variant in enumerate(variants):
        item = Item(key=f"{number}", camera="gate", time=START + number)
        vector_1D = np.eye(1, buffer._gallery.embed_dim, dtype=np.float32)
        buffer.put([item], vector_1D, variant, [(0.0, 0.0)])
    buffer.close()


def test_rows_of_several_variants_all_come_in_order_with_their_own(encoder, remote, options):
    variants = ["fp32", "fp32", "int8", "int8", "fp32", None, "int8"]
    fill(DiskBuffer(options["buffer"], remote, 1 << 30), variants)
    with Pipeline(encoder, remote, **options) as pipeline:
        assert pipeline.drain(60)
    stats = pipeline.stats()
    assert (stats.recovered, stats.buffered, remote.count()) == (7, 0, 7)
    assert [item.key for item in remote.added] == ["0", "1", "2", "3", "4", "5", "6"]
    assert remote.info().variants == {"fp32": 3, "int8": 3}


def test_rows_that_wait_for_another_gallery_or_model_are_reported(
    encoder, remote, options, monkeypatch, caplog
):
    def filled(rows, **of_another):
        with monkeypatch.context() as patched:
            for name, value in of_another.items():
                patched.setattr(remote._gallery, name, value)
            buffer = DiskBuffer(options["buffer"], remote, 1 << 30)
            fill(buffer, ["fp32"] * rows)
        return buffer

    address = filled(2, location="milvus://localhost:1/people?timeout=3")
    model = filled(1, fingerprint="b" * 16)
    filled(0, fingerprint="c" * 16)
    (options["buffer"] / "empty.sqlite").touch()

    def reported():
        caplog.clear()
        with Pipeline(encoder, remote, **options):
            pass
        left = [record for record in caplog.records if record.event == "buffered_for_other"]
        return {r.path: (r.rows, r.gallery, r.fingerprint) for r in left}

    expected = {
        address.path: (2, "milvus://localhost:1/people", remote.fingerprint),
        model.path: (1, remote.location, "b" * 16),
    }
    assert reported() == expected
    with closing(sqlite3.connect(address.path)) as connection, connection:
        connection.execute("DROP TABLE about")  # As older versions write it.
    expected[address.path] = (2, None, None)
    model.open()  # Another process sends its rows.
    del expected[model.path]
    damaged = options["buffer"] / "damaged.sqlite"
    damaged.write_bytes(b"no database" * 1000)
    expected[damaged] = (None, None, None)
    assert reported() == expected
    model.close()


KILLED = """
import os, signal
import upperson_rt
from tests.helpers.fake_camera import started, submit, wait_for
from tests.helpers.remote_gallery import RemoteGallery, refuse
from upperson_rt.gallery import Gallery

encoder = upperson_rt.open(sys.argv[1], "fp32", "onnxruntime", threads=1)
with Gallery.open(sys.argv[2], encoder.fingerprint, encoder.embed_dim, create=True) as gallery:
    remote = RemoteGallery(gallery)
    pipeline = started(encoder, remote, buffer=sys.argv[3], save_crops=False, frame_queue=64)
    submit(pipeline, 3)
    pipeline.drain()
    remote.away = refuse
    submit(pipeline, 5, first=3)
    pipeline.drain(0)
    wait_for(lambda: pipeline.stats().buffered == 5)
    if sys.argv[4] == "behind its commit":
        pipeline._buffer.remove = lambda rows: os.kill(os.getpid(), signal.SIGKILL)
        remote.away = None
        wait_for(lambda: False)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("moment", ["while it is away", "behind its commit"])
def test_rows_outlive_a_killed_process_and_come_once(bundle, encoder, gallery, options, moment):
    gallery.close()
    done = run_code(KILLED, bundle, gallery.path, options["buffer"], moment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with Gallery.open(gallery.path) as opened:
        remote = RemoteGallery(opened)
        assert remote.count() == (3 if moment == "while it is away" else 8)
        with Pipeline(encoder, remote, **options) as pipeline:
            assert pipeline.drain(60)
        assert pipeline.stats().recovered == 5
        assert sorted(item.time for item in opened.items()) == [START + n for n in range(8)]


def test_rows_whose_answer_was_lost_come_once_and_count_as_ours(
    encoder, remote, options, clock, caplog, monkeypatch
):
    monkeypatch.setattr("upperson_camera.commit._CHECK_EVERY_S", 0)
    pipeline = started(encoder, remote, **options)
    submit(pipeline, 2)
    pipeline.drain(60)
    remote.loses_answer = True
    submit(pipeline, 3, first=2)
    wait_for(lambda: remote._gallery.count() == 5)
    remote.loses_answer = False
    assert pipeline.drain(60)
    submit(pipeline, 1, first=5)
    pipeline.stop()
    camera = pipeline.stats().cameras["gate"]
    assert (camera.committed, camera.added_by_others, remote.count()) == (6, 0, 6)


def test_a_gallery_that_hangs_at_the_end_is_abandoned_and_its_rows_wait(
    encoder, remote, options, patience, monkeypatch
):
    with Gate() as gate:
        remote.away = gate.hold
        pipeline = started(encoder, remote, **options)
        submit(pipeline, 2)
        wait_for(lambda: gate.entered == 1)
        # All is on disk, and the end waits for the gallery alone: now its time is up.
        monkeypatch.setattr(
            pipeline._buffer, "finish", lambda: setattr(patience, "more_s", 2 * LIMIT_S)
        )
        with refused("gallery_away", BackendError, waiting=2):
            pipeline.stop()
        assert pipeline.stats().stuck
    with Pipeline(encoder, remote, **options) as pipeline:
        pass
    assert pipeline.stats().recovered == remote.count() == 2


def test_a_disk_that_hangs_is_abandoned(encoder, remote, options):
    options["end_within_s"] = 0.2
    with Gate() as gate:
        pipeline = started(encoder, remote, **options)
        pipeline._buffer._measure = lambda connection: gate.hold()
        submit(pipeline, 1)
        wait_for(lambda: gate.entered == 1)
        with refused("buffer_stuck", InputError):
            pipeline.stop()
        assert pipeline.stats().cameras["gate"].crops_dropped == {"failed": 1}
    pipeline._buffer.close()


def test_a_full_buffer_accepts_nothing_more_and_counts_it(encoder, remote, options, clock, caplog):
    remote.away = refuse
    options |= {"buffer_bytes": 40_000, "motion_gate": False}
    with Pipeline(encoder, remote, **options) as pipeline:
        pipeline.add_camera("gate")
        number = 0
        while not pipeline.stats().cameras["gate"].crops_dropped:
            submit(pipeline, 1, first=number)
            number += 1
        dropped = pipeline.stats().cameras["gate"].crops_dropped
        assert dropped.keys() == {"buffer_full"}
        opener = FakeOpener([person_frame()] * 40)
        pipeline.add_camera("film", FILE, lambda frame: [BOX], start_time=START, opener=opener)
        wait_for(lambda: pipeline.stats().cameras["film"].frames_waiting)
        assert pipeline.stats().cameras["film"].accepted == 0, "a file waits"
        remote.away = None
        wait_for(lambda: pipeline.stats().cameras["film"].state == "ended")
        assert pipeline.drain(60)
    stats = pipeline.stats()
    assert stats.cameras["film"].committed == 40
    gate = stats.cameras["gate"]
    assert gate.committed + gate.crops_dropped["buffer_full"] == gate.frames_read == number
    assert stats.buffered_bytes < 40_000
    assert "buffer_full" in {record.event for record in caplog.records}


def test_a_buffer_that_cannot_be_used_is_refused_before_any_crop(encoder, remote, options):
    path = options["buffer"]
    with refused("commits_not_batched", UsageError):
        Pipeline(encoder, remote, commit_every_s=10.0, **options)
    with Pipeline(encoder, remote, **options):
        with refused("buffer_in_use", InputError):
            Pipeline(encoder, remote, **options).start()
        (file,) = path.glob("*.sqlite")
        assert file.stat().st_mode & 0o077 == 0
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("PRAGMA user_version = 9")
    with refused("buffer_unsupported", IntegrityError, found=9):
        Pipeline(encoder, remote, **options).start()
    file.write_bytes(b"no database" * 1000)
    with refused("buffer_damaged", IntegrityError):
        Pipeline(encoder, remote, **options).start()
    with refused("buffer_not_writable", InputError):
        Pipeline(encoder, remote, **{**options, "buffer": file / "folder"}).start()


def test_a_local_disk_that_is_full_stops_the_pipeline(encoder, remote, options):
    options["end_within_s"] = 0.2
    remote.away = refuse
    pipeline = started(encoder, remote, **options)
    pipeline._buffer._connection.execute("PRAGMA max_page_count = 4")
    with suppress(InputError):
        submit(pipeline, 300)
    with refused("buffer_not_writable", InputError):
        pipeline.stop()
    stats = pipeline.stats()
    assert stats.failures == {"buffer_error": 1}
    camera = stats.cameras["gate"]
    assert camera.crops_dropped["failed"] > 0
    assert camera.crops_waiting == stats.buffered, "what is not on disk is counted"


def test_rows_are_checked_before_they_wait(gallery, tmp_path):
    buffer = DiskBuffer(tmp_path, gallery, 1)
    buffer.open()
    vectors = np.eye(1, gallery.embed_dim, dtype=np.float32)
    with refused("vectors_invalid", InputError):
        buffer.put([Item(key="a")], 0 * vectors, None, [(0, 0)])
    with refused("item_invalid", InputError):
        buffer.put([Item(key="a\0")], vectors, None, [(0, 0)])
    assert buffer.first(9) == []
    item = Item(key="a", camera="gate", time=1.5, track="t", box=(1, 2, 3, 4), attributes={"a": 1})
    buffer.put([item], vectors, "int8", [(1.0, 2.0)])
    (row,) = buffer.first(9)
    assert (row.item, row.variant, row.stamps, row.is_own) == (item, "int8", (1.0, 2.0), True)
    assert np.array_equal(row.vector_D, vectors[0])
    buffer.close()
    assert buffer.open() == 1
    assert not buffer.first(9)[0].is_own
    buffer.close()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("vector", b"\0"), ("vector", np.full(16, np.nan, "<f4").tobytes()), ("key", "a\0"),
        ("attributes", "{"), ("variant", b"fp32"), ("chosen", "soon"),
    ],
    ids=["short", "nan", "key", "attributes", "variant", "chosen"],
)  # fmt: skip
def test_a_damaged_row_is_named_and_the_run_without_it_sends_the_others(
    encoder, remote, options, column, value
):
    buffer = DiskBuffer(options["buffer"], remote, 1 << 30)
    fill(buffer, ["fp32"] * 5)
    with closing(sqlite3.connect(buffer.path)) as connection, connection:
        connection.execute(f"UPDATE rows SET {column} = ? WHERE seq = 3", (value,))
    pipeline = Pipeline(encoder, remote, **options)
    pipeline.start()
    wait_for(lambda: pipeline.stats().failures)
    with refused("buffer_damaged", IntegrityError, row=3, path=buffer.path) as error:
        pipeline.stop()
    assert pipeline.stats().buffered == 5
    statement = re.search(r"'(DELETE .+?)'", str(error.value))[1]
    with closing(sqlite3.connect(buffer.path)) as connection, connection:
        connection.execute(statement)
    with Pipeline(encoder, remote, **options) as pipeline:
        assert pipeline.drain(60)
    assert [item.key for item in remote.added] == ["0", "1", "3", "4"]


# --- A server that is away when cameras start: it is opened once it is back


ADDRESS = "milvus://ann:secret@host/people"
SHOWN = "milvus://ann@host:19530/people"


class Server:
    """Answers `Gallery.open` with what `outcome` does, at first with an error."""

    def __init__(self):
        self.attempts = []
        self.fails_with(BackendError, "connection refused", "server_away", location=SHOWN)

    def fails_with(self, kind, text, code, **fields):
        def fail():
            raise kind(text, code=code, **fields)

        self.outcome = fail

    def open(self, address, fingerprint, embed_dim, *, create):
        self.attempts.append((address, fingerprint, embed_dim, create))
        return self.outcome()


@pytest.fixture
def server(remote, monkeypatch):  # The gallery itself is opened before.
    server = Server()
    monkeypatch.setattr("upperson_camera.late_gallery.Gallery.open", server.open)
    return server


@pytest.fixture
def begun(server, encoder, tmp_path, clock):
    """A pipeline with a camera, started while the server is away, and its gallery."""
    late = open_now_or_later(ADDRESS, encoder.fingerprint, encoder.embed_dim)
    options = {"buffer": tmp_path, "save_crops": False, "end_within_s": LIMIT_S}
    return started(encoder, late, **options), late


def test_what_is_accepted_waits_and_is_sent_when_the_server_is_back(
    begun, server, remote, encoder, clock, caplog
):
    pipeline, late = begun
    assert isinstance(late, LateGallery)
    assert (late.location, "secret" in caplog.text) == (SHOWN, False)
    submit(pipeline, 5)
    wait_for(lambda: pipeline.stats().buffered == 5)
    clock.more_s += 10
    assert pipeline.stats().gallery_problem == "connection refused"
    server.outcome = lambda: remote
    assert pipeline.drain(60)
    pipeline.stop()
    assert [item.time for item in remote.added] == [START + n for n in range(5)]
    assert pipeline.stats().gallery_problem is None
    assert set(server.attempts) == {(ADDRESS, encoder.fingerprint, encoder.embed_dim, True)}
    late.close()


@pytest.mark.parametrize("rows", [0, 3])
def test_the_model_is_checked_once_the_server_is_back_and_rows_that_do_not_fit_are_kept(
    begun, server, tmp_path, caplog, rows
):
    pipeline, late = begun
    submit(pipeline, rows)
    wait_for(lambda: pipeline.stats().buffered == rows)
    server.fails_with(IntegrityError, "of another model", "gallery_of_other_model")
    wait_for(lambda: pipeline.stats().failures)
    with refused("gallery_of_other_model", IntegrityError):
        pipeline.stop()
    assert [r.waiting for r in caplog.records if r.event == "buffered"] == [rows]
    buffer = DiskBuffer(tmp_path, late, 1 << 30)
    assert buffer.open() == rows
    buffer.close()


def test_a_user_that_is_refused_later_is_warned_of_at_a_bounded_rate(begun, server, clock, caplog):
    def warnings():
        return [r for r in caplog.records if r.event == "gallery_away" and "password" in r.message]

    def many_tries():
        tries = len(server.attempts)
        wait_for(lambda: len(server.attempts) > tries + 20)

    pipeline, _ = begun
    server.fails_with(BackendError, "wrong password", "user_refused")
    many_tries()
    for minute in range(1, 4):
        clock.more_s += 61
        wait_for(lambda count=minute: len(warnings()) == count)
    assert pipeline.stats().gallery_problem == "wrong password"
    many_tries()
    assert len(warnings()) == 3
    with refused("gallery_away", BackendError, waiting=0) as error:
        pipeline.stop()
    assert "wrong password" in str(error.value)


def test_an_opening_that_hangs_at_the_end_is_abandoned(begun, server, patience, monkeypatch):
    pipeline, _ = begun
    with Gate() as gate:
        server.outcome = gate.hold
        wait_for(lambda: gate.entered == 1)
        finish = pipeline._buffer.finish
        monkeypatch.setattr(
            pipeline._buffer, "finish", lambda: [finish(), setattr(patience, "more_s", 2000)]
        )
        with refused("gallery_away", BackendError, waiting=0):
            pipeline.stop()
        assert pipeline.stats().stuck


def test_what_will_never_work_is_refused_at_once(server):
    for kind, code in (
        (BackendError, "user_refused"),
        (BackendError, "extra_missing"),
        (IntegrityError, "gallery_of_other_model"),
    ):
        server.fails_with(kind, "it will never work", code)
        with refused(code, kind):
            open_now_or_later(ADDRESS, "a" * 16, 8)
    assert len(server.attempts) == 3

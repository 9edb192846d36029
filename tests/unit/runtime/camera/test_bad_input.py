"""Frames, vectors and disks that are not as they should be, and processes that were killed."""

import errno
import json
import os
import signal
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.command_line import run_code
from tests.helpers.fake_camera import (
    ALL,
    BOX,
    FILE,
    LIVE,
    PATIENT,
    START,
    FakeOpener,
    person_frame,
    pictures_of,
    started,
    submit,
    wait_for,
)
from tests.helpers.refused import refused
from upperson_camera import Pipeline
from upperson_camera.crop_folder import UnfinishedNote
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.gallery import Gallery, Item
from upperson_rt.gallery.sqlite import access, database
from upperson_rt.ingest.boxes import QualityRules


def test_a_person_20000_pixels_wide_is_a_row_and_one_too_large_for_jpeg_is_counted(
    encoder, gallery, caplog
):
    rules = QualityRules(min_sharpness=0.0)
    with Pipeline(encoder, gallery, max_delay_s=0, quality=rules, **ALL) as pipeline:
        pipeline.add_camera("gate")
        for width in (20_000, 70_000):
            frame = np.zeros((64, width, 3), np.uint8)
            pipeline.submit("gate", frame, [[0, 0, width, 64]], START + width)
            pipeline.drain()
    assert pipeline.stats().cameras["gate"].crops_dropped == {"unusable": 1}
    assert "70000 x 64" in caplog.text
    (item,) = gallery.items()
    with Image.open(gallery.crops_dir / item.crop) as picture:
        assert picture.size == (20_000, 64)


def test_frames_of_other_kinds_from_a_source_are_converted_or_counted(encoder, gallery):
    frame = person_frame()
    infrared = frame[:, :, 0]
    frames = [np.dstack([frame, infrared]), infrared, frame[:, :, :1]]  # The first is BGRx.
    frames.append((infrared.astype(np.uint16) << 8) + 255)  # 16 bits.
    expected = [frame, *[np.dstack([infrared] * 3)] * 3]
    frames += [np.zeros(shape, np.uint8) for shape in ((0, 0, 3), (4, 4, 2), (4,), (2, 4, 4, 3))]
    frames.append(np.zeros((4, 4), np.float32))

    def detector(found):
        np.testing.assert_array_equal(found, expected.pop(0))
        assert found.flags.c_contiguous
        return []

    options = {"opener": FakeOpener(frames), "capture_rules": PATIENT, "frame_queue": 8}
    with Pipeline(encoder, gallery, **options) as pipeline:
        pipeline.add_camera("gate", LIVE, detector)
        wait_for(lambda: pipeline.stats().cameras["gate"].frames_read == len(frames))
        wait_for(lambda: pipeline.stats().cameras["gate"].frames_waiting == 0)
    camera = pipeline.stats().cameras["gate"]
    assert (camera.frames_dropped, camera.frames_processed, expected) == ({"empty": 5}, 4, [])


@pytest.mark.parametrize("wrong", ["nan", "locked", "folder"])
def test_what_cannot_be_committed_stops_the_pipeline(encoder, tmp_path, monkeypatch, wrong):
    dim = encoder.embed_dim
    if wrong == "nan":
        encoder.backend("image")  # What is wrong when it is loaded is found by golden samples.
        bad = np.full((1, dim), np.nan, np.float32)
        monkeypatch.setattr("upperson_rt.encoder.run_tower", lambda backend, tower, pixels: bad)
    monkeypatch.setattr(access, "LOCK_TIMEOUT_S", 0.05)
    folder = tmp_path / "gallery"
    with Gallery.open(folder, encoder.fingerprint, dim, create=True) as gallery:
        if wrong == "folder":
            gallery.crops_dir.mkdir()
            (gallery.crops_dir / "gate").write_text("a file where a folder should be")
        path = folder / database.DATABASE_FILE
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            if wrong == "locked":
                other.execute("BEGIN IMMEDIATE")
            pipeline = started(encoder, gallery)
            submit(pipeline)
            with pytest.raises(IntegrityError if wrong == "nan" else InputError):
                pipeline.stop()
        assert pipeline.stats().cameras["gate"].crops_dropped == {"failed": 1}
        assert gallery.count() == 0
        assert not list(gallery.crops_dir.rglob("*.jpg"))


FULL = """
import resource
import upperson_rt
from tests.helpers.fake_camera import check_sums, started, submit
from upperson_rt.errors import InputError
from upperson_rt.gallery import Gallery

encoder = upperson_rt.open(sys.argv[1], "fp32", "onnxruntime", threads=1)
with Gallery.open(sys.argv[2], encoder.fingerprint, encoder.embed_dim, create=True) as gallery:
    done = []
    pipeline = started(encoder, gallery, on_commit=done.extend, batch_size=1)
    # The system refuses to let files grow, as it does when a disk is full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    try:
        for number in range(10_000):
            submit(pipeline, first=number)
            pipeline.drain()
    except InputError as error:
        print(type(error).__name__)
    check_sums(pipeline.stats(), ended=False)
    assert pipeline.stats().cameras["gate"].crops_waiting == 0
    assert {item.key for item in gallery.items()} == {item.key for item in done}
    print(len(done))
"""


def test_a_full_disk_is_an_error_and_loses_nothing_that_was_acknowledged(bundle, encoder, tmp_path):
    done = run_code(FULL, bundle, tmp_path / "gallery")
    assert done.returncode == 0, done.stderr
    error, rows = done.stdout.splitlines()
    assert (error, int(rows) > 3) == ("InputError", True)
    with Gallery.open(tmp_path / "gallery", encoder.fingerprint) as gallery:
        assert gallery.count() == len(pictures_of(gallery)) == int(rows)
        assert gallery.verify() == []


def test_a_defect_in_one_camera_leaves_the_others_alone(encoder, gallery, monkeypatch, caplog):
    def opener(source, timeout_s):
        raise RuntimeError("no licence")

    with Pipeline(encoder, gallery, max_delay_s=0, opener=opener, **ALL) as pipeline:
        for name in ("broken", "gate"):
            pipeline.add_camera(name)
        pipeline.add_camera("film", FILE, lambda frame: [], start_time=START)
        tracker = pipeline._cameras["broken"]._worker._tracker
        monkeypatch.setattr(tracker, "update", lambda *given: 1 / 0)
        for second in range(2):
            for name in ("broken", "gate"):
                pipeline.submit(name, person_frame(), [BOX], START + second)
            pipeline.drain()
        wait_for(lambda: pipeline.stats().cameras["film"].state == "failed")
    cameras = pipeline.stats().cameras
    assert cameras["film"].error == "RuntimeError: no licence"
    assert cameras["broken"].state == "failed"
    assert "ZeroDivisionError" in cameras["broken"].error
    assert cameras["broken"].frames_dropped == {"camera_failed": 1}
    assert cameras["gate"].committed == gallery.count() == 2
    failed = [record.camera for record in caplog.records if record.event == "failed"]
    assert sorted(failed) == ["broken", "film"]


# --- Pictures of a process that was killed before it committed their rows


KILLED = """
import os, signal
import upperson_rt
from tests.helpers.fake_camera import started, submit
from upperson_rt.gallery import Gallery

encoder = upperson_rt.open(sys.argv[1], "fp32", "onnxruntime", threads=1)
with Gallery.open(sys.argv[2], encoder.fingerprint, encoder.embed_dim, create=True) as gallery:
    pipeline = started(encoder, gallery)
    submit(pipeline, 3)
    pipeline.drain()
    gallery.add = lambda *items: os.kill(os.getpid(), signal.SIGKILL)
    submit(pipeline, first=3)
    pipeline.drain()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL and locks of POSIX")
def test_the_next_run_removes_what_a_killed_one_left(bundle, encoder, gallery, caplog):
    done = run_code(KILLED, bundle, gallery.path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    note, *pictures = pictures_of(gallery)
    assert (len(pictures), gallery.count()) == (4, 3)
    (left,) = json.loads(note.read_bytes())["pictures"]
    half = gallery.crops_dir / os.path.dirname(left) / f".{os.path.basename(left)}.x7"
    half.write_bytes(b"half a picture")
    with Pipeline(encoder, gallery) as pipeline:
        assert len(pictures_of(gallery)) == 4, "three pictures, and the note of this run"
        pipeline.drain()
    assert pictures_of(gallery) == sorted(gallery.crops_dir / item.crop for item in gallery.items())
    assert len(pictures_of(gallery)) == 3
    assert [r.pictures for r in caplog.records if r.event == "left_behind"] == [1]
    assert gallery.verify() == []


def test_the_note_of_a_process_that_lives_is_respected(encoder, gallery):
    gallery.crops_dir.mkdir()
    picture = gallery.crops_dir / "a.jpg"
    picture.write_bytes(b"x")
    note = UnfinishedNote(gallery.crops_dir, "other")
    with note.kept([Item(key="a", camera="gate", time=1e9, crop="a.jpg")]):
        with Pipeline(encoder, gallery):
            pass
        assert picture.is_file()
    note.close()
    assert pictures_of(gallery) == [picture], "no note names it"
    # Half a note, an empty one, and one that another process has just removed.
    for name, content in (("a", ""), ("b", '{"cameras": ["gate"], "pictures": ["a.j')):
        (gallery.crops_dir / f".unfinished-{name}.json").write_text(content)
    (gallery.crops_dir / ".unfinished-gone.json").symlink_to("nowhere")
    with Pipeline(encoder, gallery):
        pass
    assert pictures_of(gallery) == [picture]


def test_pictures_of_a_process_killed_right_behind_its_commit_stay(encoder, gallery):
    """Its note names them still, the last one with the very end of the note's period."""
    gallery.crops_dir.mkdir()
    items = [
        Item(key=name, camera="gate", time=1e9 + number / 8, crop=f"{name}.jpg")
        for number, name in enumerate("abc")
    ]
    for item in items:
        (gallery.crops_dir / item.crop).write_bytes(b"x")
    note = UnfinishedNote(gallery.crops_dir, "killed")
    path = gallery.crops_dir / ".unfinished-killed.json"
    with note.kept(items):
        content = path.read_bytes()
        gallery.add(items, np.eye(len(items), encoder.embed_dim, dtype=np.float32))
    note.close()
    path.write_bytes(content)
    with Pipeline(encoder, gallery):
        pass
    assert pictures_of(gallery) == [gallery.crops_dir / item.crop for item in items]


@pytest.mark.parametrize("writable", [True, False], ids=["unlink fails", "all fails"])
def test_pictures_on_a_disk_that_turns_read_only_go_the_next_time(
    encoder, gallery, writable, monkeypatch
):
    def read_only(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    add = gallery.add

    def turn(*arguments):
        monkeypatch.setattr(Path, "unlink", read_only)
        if not writable:
            monkeypatch.setattr(UnfinishedNote, "_empty", read_only)
        raise InputError("the disk is read-only")

    pipeline = started(encoder, gallery)
    submit(pipeline)
    pipeline.drain()
    monkeypatch.setattr(gallery, "add", turn)
    submit(pipeline, first=1)
    with pytest.raises(InputError, match="the disk is read-only"):
        pipeline.stop()
    note, *pictures = pictures_of(gallery)
    assert len(pictures) == 2
    with refused("file_not_writable", InputError, path=gallery.crops_dir):
        Pipeline(encoder, gallery).start()
    monkeypatch.undo()
    assert gallery.add == add
    with Pipeline(encoder, gallery):
        assert not note.exists()
    assert pictures_of(gallery) == [gallery.crops_dir / item.crop for item in gallery.items()]
    assert len(pictures_of(gallery)) == 1


def test_a_note_is_on_disk_first_and_one_that_is_swept_before_it_is_locked_is_made_again(
    gallery, monkeypatch
):
    path = gallery.crops_dir / ".unfinished-mine.json"
    locked, flushed = [], []

    def lock(handle, *, wait=False):
        if not locked:  # As a process does that found it between its making and its locking.
            path.unlink()
        locked.append(handle)
        return True

    monkeypatch.setattr("upperson_camera.crop_folder.lock_until_closed", lock)
    note = UnfinishedNote(gallery.crops_dir, "mine")
    assert len(locked) == 2
    monkeypatch.setattr(os, "fsync", lambda _: flushed.append(json.loads(path.read_bytes())))
    with note.kept([Item(key="a", camera="gate", time=1e9, crop="a.jpg")]):
        assert json.loads(path.read_bytes())["pictures"] == ["a.jpg"]
        assert [content["pictures"] for content in flushed] == [["a.jpg"]]
    note.close()
    assert not path.exists()

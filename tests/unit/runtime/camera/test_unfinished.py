"""Pictures of a process that was killed between saving them and committing their rows."""

import errno
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.command_line import run_code
from tests.helpers.fake_camera import BOX, person_frame, pictures_of
from tests.helpers.refused import refused
from upperson_camera import Pipeline
from upperson_camera.crop_folder import UnfinishedNote
from upperson_rt.errors import InputError
from upperson_rt.gallery import Item

KILLED = """
import os, signal
import upperson_rt
from tests.helpers.fake_camera import BOX, person_frame
from upperson_camera import Pipeline
from upperson_rt.gallery import Gallery

encoder = upperson_rt.open(sys.argv[1], "fp32", "onnxruntime", threads=1)
with Gallery.open(sys.argv[2], encoder.fingerprint, encoder.embed_dim, create=True) as gallery:
    with Pipeline(encoder, gallery, every_s=0, min_views=1) as pipeline:
        pipeline.add_camera("gate")
        for number in range(6):
            if number == 3:
                gallery.add = lambda *items: os.kill(os.getpid(), signal.SIGKILL)
            pipeline.submit("gate", person_frame(), [BOX], 1e9 + number)
            pipeline.drain()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL and locks of POSIX")
def test_the_next_run_removes_what_a_killed_one_left(bundle, encoder, gallery, caplog):
    done = run_code(KILLED, bundle, gallery.path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    note, *pictures = pictures_of(gallery)
    assert len(pictures) == 4
    assert gallery.count() == 3
    left = json.loads(note.read_bytes())["pictures"]
    assert len(left) == 1
    half = gallery.crops_dir / os.path.dirname(left[0]) / f".{os.path.basename(left[0])}.x7"
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

    pipeline = Pipeline(encoder, gallery, every_s=0, min_views=1)
    pipeline.start()
    pipeline.add_camera("gate")
    pipeline.submit("gate", person_frame(), [BOX], 1e9)
    pipeline.drain()
    monkeypatch.setattr(gallery, "add", turn)
    pipeline.submit("gate", person_frame(), [BOX], 1e9 + 1)
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


def test_without_pictures_nothing_is_written(encoder, gallery):
    with Pipeline(encoder, gallery, every_s=0, min_views=1, save_crops=False) as pipeline:
        pipeline.add_camera("gate")
        pipeline.submit("gate", person_frame(), [BOX])
    assert gallery.count() == 1
    assert not gallery.crops_dir.exists()

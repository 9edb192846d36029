"""Frames and clips go with the pictures of those whom they show."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.command_line import environment
from tests.helpers.refused import refused
from upperson_rt.errors import InputError
from upperson_rt.gallery import Gallery, Item
from upperson_rt.gallery.clips import all_clips, clip_name, clips_dir, clips_of
from upperson_rt.gallery.crops import crop_path
from upperson_rt.gallery.sqlite import schema

START = 1_790_000_000.0


@pytest.fixture
def gallery(tmp_path):
    with Gallery.open(tmp_path / "gallery", "toy", 4, create=True) as opened:
        yield opened


def add(gallery, *rows):
    """Add rows of a camera, a track and a time, each with crop, frame and a clip of 10 s."""
    for camera, track, seconds in rows:
        at = START + seconds
        crop = f"{camera}/2026-11-30/{track}-{seconds}.sha256-{'0' * 32}.jpg"
        item = Item(key=f"{camera}{track}{seconds}", camera=camera, track=track, time=at, crop=crop)
        for path in (
            gallery.crops_dir / crop,
            clips_dir(gallery.crops_dir) / clip_name(crop, ".jpg", at),
            clips_dir(gallery.crops_dir) / clip_name(crop, ".mp4", at - 5, at + 5),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"picture")
        gallery.add([item], np.eye(4, dtype=np.float32)[:1])


def left(gallery):
    """Camera, and crop with the kind, of all that is kept."""
    kinds = {True: "clip", False: "frame"}
    found = {}
    for file in all_clips(gallery.crops_dir):
        name = f"{file.path.parent.parent.name} {file.crop.partition('.')[0]}"
        found.setdefault(name, set()).add(kinds[file.is_clip])
    return found


BOTH = {"frame", "clip"}


def test_a_deleted_person_is_in_no_frame_or_clip_of_others(gallery):
    add(
        gallery,
        ("gate", "anna", 100), ("gate", "anna", 400),
        ("gate", "ben", 70), ("gate", "ben", 86), ("gate", "ben", 250), ("gate", "ben", 700),
        ("gate", "ben", 712), ("gate", "ben", 720), ("hall", "eve", 100),
    )  # fmt: skip
    assert gallery.delete(["gateanna100", "gateanna400"]) == 2
    # The clip of 86 ends at 91, within 10 s of Anna's first picture; its frame is earlier. The clip
    # of 712 begins at 707, within 310 s of her last one: she may have stood still.
    partly = {"gate ben-86": {"frame"}, "gate ben-712": {"frame"}}
    whole = {"gate ben-70": BOTH, "gate ben-720": BOTH, "hall eve-100": BOTH}
    assert left(gallery) == whole | partly
    assert gallery.count() == 7


def test_one_row_of_a_track_stands_for_its_own_time_only(gallery):
    add(gallery, ("gate", "anna", 100), ("gate", "anna", 1000), ("gate", "ben", 500))
    gallery.delete(["gateanna100"])
    assert left(gallery) == {"gate anna-1000": BOTH, "gate ben-500": BOTH}


def test_pruning_removes_clips_of_old_pictures_and_of_none(gallery):
    add(gallery, ("gate", "anna", 0), ("gate", "ben", 1000), ("gate", "eve", 0))
    stray = clip_name(f"gate/2026-11-30/x.sha256-{'1' * 32}.jpg", ".mp4", START - 9, START - 1)
    (clips_dir(gallery.crops_dir) / stray).write_bytes(b"clip")
    assert gallery.prune(older_than=START + 500) == 2
    assert left(gallery) == {"gate ben-1000": BOTH}
    assert gallery.prune(keep_newest=0) == 1
    assert left(gallery) == {}


def test_a_row_that_is_replaced_takes_its_own_files_only(gallery):
    add(gallery, ("gate", "anna", 100), ("gate", "ben", 101))
    item = Item(key="gateanna100", camera="gate", time=START + 100, crop="gate/2026-11-30/new.jpg")
    gallery.add([item], np.eye(4, dtype=np.float32)[:1])
    assert left(gallery) == {"gate ben-101": BOTH}


def test_only_own_names_count_and_nothing_outside_is_touched(gallery, tmp_path):
    add(gallery, ("gate", "anna", 100))
    (row,) = gallery.items()
    outside = tmp_path / "outside"
    outside.mkdir()
    victim = outside / clip_name("x.jpg", ".mp4", START, START + 200)
    victim.write_bytes(b"mine")
    day = clips_dir(gallery.crops_dir) / "gate" / "2026-11-30"
    (day / f".{clip_name('x.jpg', '.mp4', START, START)}").write_bytes(b"half")
    (day / "notes.txt").write_text("not ours")
    os.symlink(victim, day / victim.name)
    (clips_dir(gallery.crops_dir) / "gate" / "linked").symlink_to(outside)
    assert len(clips_of(gallery.crops_dir, row.crop)) == 2
    assert clips_of(gallery.crops_dir, "../../outside/x.jpg") == []
    other_name = gallery.crops_dir / ".." / gallery.crops_dir.name
    assert crop_path(other_name, "a.jpg") == other_name / "a.jpg", "a user named it so"
    assert crop_path(other_name, "../a.jpg") is None
    assert clips_of(gallery.crops_dir, "/etc/passwd") == []
    gallery.delete(["gateanna100"])
    assert left(gallery) == {}
    assert (day / "notes.txt").exists()
    assert victim.exists()


@pytest.mark.parametrize("inside", [False, True])
def test_a_camera_that_is_a_link_keeps_what_it_leads_to(gallery, tmp_path, inside):
    folder = clips_dir(gallery.crops_dir)
    add(gallery, ("gate", "anna", 100))
    target = folder / "hall" if inside else tmp_path / "outside"
    (folder / "gate").rename(target)
    (folder / "gate").symlink_to(target)
    assert gallery.delete(["gateanna100"]) == 1
    assert len(list(target.rglob("*.mp4"))) == 1


def test_a_link_as_the_folder_of_clips_is_followed(gallery, tmp_path):
    folder = clips_dir(gallery.crops_dir)
    add(gallery, ("gate", "anna", 100))
    folder.rename(tmp_path / "disk")
    folder.symlink_to(tmp_path / "disk")
    assert gallery.delete(["gateanna100"]) == 1
    assert not list((tmp_path / "disk").rglob("*.*"))


@pytest.mark.parametrize(
    "delete",
    [lambda gallery: gallery.delete(["gateanna100"]), lambda gallery: gallery.prune(START + 200)],
)
def test_rows_stay_while_a_clip_of_theirs_cannot_be_removed(gallery, monkeypatch, delete):
    add(gallery, ("gate", "anna", 100), ("gate", "ben", 300))
    unlink = Path.unlink

    def refusing(path, missing_ok=False):
        if path.suffix == ".mp4":
            raise OSError(errno.EACCES, "Permission denied", str(path))
        unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refusing)
        with refused("clips_not_removed", InputError) as found:
            delete(gallery)
    (row,) = (item for item in gallery.items() if item.track == "anna")
    assert found.value.fields["path"].endswith(".mp4")
    assert (gallery.crops_dir / row.crop).exists()
    gallery.check()
    assert delete(gallery) == 1
    assert "gate anna-100" not in left(gallery)
    assert [item.track for item in gallery.items()] == ["ben"]


KILLED = """
import os, signal, sys
from upperson_rt.gallery import Gallery
from upperson_rt.gallery.sqlite import schema
with Gallery.open(sys.argv[1]) as gallery:
    place = {"write_sums": schema.Description, "write_mark": schema}[sys.argv[2]]
    setattr(place, sys.argv[2], lambda *values: os.kill(os.getpid(), signal.SIGKILL))
    gallery.delete(["gateanna100"])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("call", "rows"), [("write_sums", 2), ("write_mark", 1)])
def test_a_deletion_that_is_killed_leaves_no_frame_or_clip(gallery, call, rows):
    """Killed just before and just after its commit."""
    add(gallery, ("gate", "anna", 100), ("gate", "ben", 104), ("hall", "eve", 100))
    folder = gallery.location
    gallery.close()
    command = [sys.executable, "-c", KILLED, folder, call]
    assert subprocess.run(command, check=False, env=environment()).returncode == -signal.SIGKILL
    with Gallery.open(folder) as again:
        assert left(again) == {"hall eve-100": BOTH}
        assert again.count() == rows + 1
        assert again.delete(["gateanna100"]) == rows - 1
        assert again.count() == 2


def test_what_is_written_during_a_deletion_goes_as_well(gallery, monkeypatch):
    add(gallery, ("gate", "anna", 100), ("gate", "ben", 104))
    commit = schema.write_mark
    late = clips_dir(gallery.crops_dir) / clip_name("gate/2026-11-30/x.jpg", ".jpg", START + 101)

    def committed(*values):
        late.write_bytes(b"clip")
        monkeypatch.setattr(schema, "write_mark", commit)
        commit(*values)

    monkeypatch.setattr(schema, "write_mark", committed)
    gallery.delete(["gateanna100"])
    assert not late.exists()

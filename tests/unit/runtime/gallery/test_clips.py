"""Frames and clips go with the pictures of those whom they show."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.command_line import environment
from tests.helpers.gallery_places import START, add_filmed, open_new, put, save
from tests.helpers.refused import refused
from upperson_rt.errors import InputError
from upperson_rt.gallery import Gallery
from upperson_rt.gallery.clips import all_clips, clip_name, clips_dir, clips_of
from upperson_rt.gallery.crops import crop_path
from upperson_rt.gallery.sqlite import schema

BOTH = {"frame", "clip"}


@pytest.fixture
def gallery(tmp_path):
    with open_new(tmp_path / "gallery") as opened:
        yield opened


@pytest.fixture
def clips(gallery):
    """The folder of frames and clips."""
    return clips_dir(gallery.crops_dir)


def left(gallery):
    """The kinds of all that is kept, by camera and crop."""
    found = {}
    for file in all_clips(gallery.crops_dir):
        name = f"{file.path.parent.parent.name}/{file.crop.partition('.')[0].replace('-', '/')}"
        found.setdefault(name, set()).add("clip" if file.is_clip else "frame")
    return found


def test_a_deleted_person_is_in_no_frame_or_clip_of_others(gallery):
    anna = "gate/anna/100", "gate/anna/400"
    ben = (f"gate/ben/{second}" for second in (70, 86, 250, 700, 712, 720))
    add_filmed(gallery, *anna, *ben, "hall/eve/100")
    assert gallery.delete(anna) == 2
    # The clip of 86 ends at 91, within 10 s of Anna's first picture; its frame is earlier. The clip
    # of 712 begins at 707, within 310 s of her last one: she may have stood still.
    partly = {"gate/ben/86": {"frame"}, "gate/ben/712": {"frame"}}
    whole = {"gate/ben/70": BOTH, "gate/ben/720": BOTH, "hall/eve/100": BOTH}
    assert left(gallery) == whole | partly
    assert gallery.count() == 7
    # One whose time ends earlier leaves the others theirs.
    long_and_short = "hall/eve/2000", "hall/eve/3000", "hall/finn/2100"
    add_filmed(gallery, *long_and_short, "hall/gus/2900")
    gallery.delete(long_and_short)
    assert left(gallery) == whole | partly
    # One row of a track stands for its own time only.
    add_filmed(gallery, "yard/carl/100", "yard/carl/1000", "yard/dan/500")
    gallery.delete(["yard/carl/100"])
    assert left(gallery) == whole | partly | {"yard/carl/1000": BOTH, "yard/dan/500": BOTH}


def test_pruning_and_replacing_remove_clips_of_old_pictures_and_of_none(gallery, clips):
    add_filmed(gallery, "gate/anna/0", "gate/ben/1000", "gate/eve/0", "gate/eve/1001")
    # A row that is replaced takes its own files only.
    put(gallery, ["gate/eve/1001"], camera="gate", time=START + 1001, crop="gate/day/new.jpg")
    assert left(gallery).keys() == {"gate/anna/0", "gate/ben/1000", "gate/eve/0"}
    save(clips, clip_name(f"gate/day/x.sha256-{'1' * 32}.jpg", ".mp4", START - 9, START - 1))
    assert gallery.prune(older_than=START + 500) == 2
    assert left(gallery) == {"gate/ben/1000": BOTH}
    assert gallery.prune(keep_newest=0) == 2
    assert left(gallery) == {}


def test_only_own_names_count_and_nothing_outside_is_touched(gallery, clips, tmp_path):
    add_filmed(gallery, "gate/anna/100")
    (row,) = gallery.items()
    crops, day = gallery.crops_dir, clips / "gate/day"
    victim = tmp_path / "outside" / clip_name("x.jpg", ".mp4", START, START + 200)
    save(victim.parent, victim.name)
    save(day, f".{clip_name('x.jpg', '.mp4', START, START)}", "notes.txt")
    os.symlink(victim, day / victim.name)
    (clips / "gate/linked").symlink_to(victim.parent)
    assert len(clips_of(crops, row.crop)) == 2
    assert clips_of(crops, "../../outside/x.jpg") == clips_of(crops, "/etc/passwd") == []
    other_name = crops / ".." / crops.name
    assert crop_path(other_name, "a.jpg") == other_name / "a.jpg", "a user named it so"
    assert crop_path(other_name, "../a.jpg") is None
    gallery.delete(["gate/anna/100"])
    assert left(gallery) == {}
    assert (day / "notes.txt").exists()
    assert victim.exists()


@pytest.mark.parametrize("target", ["clips/hall", "../disk"])
def test_a_folder_of_clips_that_is_a_link_is_not_followed(gallery, clips, target):
    add_filmed(gallery, "gate/anna/100")
    target = (gallery.path / target).resolve()
    (clips / "gate").rename(target)
    (clips / "gate").symlink_to(target)
    assert gallery.delete(["gate/anna/100"]) == 1
    assert len([*target.rglob("*.*")]) == 2


@pytest.mark.parametrize(
    "delete",
    [lambda gallery: gallery.delete(["gate/anna/100"]), lambda gallery: gallery.prune(START + 200)],
)
def test_rows_stay_while_a_clip_of_theirs_cannot_be_removed(gallery, monkeypatch, delete):
    add_filmed(gallery, "gate/anna/100", "gate/ben/300")
    unlink = Path.unlink

    def refusing(path, missing_ok=False):
        if path.suffix == ".mp4":
            raise OSError(errno.EACCES, "Permission denied", str(path))
        unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refusing)
        with refused("clips_not_removed", InputError) as found:
            delete(gallery)
    assert found.value.fields["path"].endswith(".mp4")
    (row,) = (item for item in gallery.items() if item.track == "anna")
    assert (gallery.crops_dir / row.crop).exists()
    gallery.check()
    assert delete(gallery) == 1
    assert "gate/anna/100" not in left(gallery)
    assert [item.track for item in gallery.items()] == ["ben"]


KILLED = """
import os, signal, sys
from upperson_rt.gallery import Gallery
from upperson_rt.gallery.sqlite import schema
with Gallery.open(sys.argv[1]) as gallery:
    place = {"write_sums": schema.Description, "write_mark": schema}[sys.argv[2]]
    setattr(place, sys.argv[2], lambda *values: os.kill(os.getpid(), signal.SIGKILL))
    gallery.delete(["gate/anna/100"])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("call", "rows"), [("write_sums", 2), ("write_mark", 1)])
def test_a_deletion_that_is_killed_leaves_no_frame_or_clip(gallery, call, rows):
    add_filmed(gallery, "gate/anna/100", "gate/ben/104", "hall/eve/100")
    gallery.close()
    command = [sys.executable, "-c", KILLED, gallery.location, call]
    assert subprocess.run(command, check=False, env=environment()).returncode == -signal.SIGKILL
    with Gallery.open(gallery.location) as again:
        assert left(again) == {"hall/eve/100": BOTH}
        assert again.count() == rows + 1
        assert again.delete(["gate/anna/100"]) == rows - 1
        assert again.count() == 2


def test_what_is_written_during_a_deletion_goes_as_well(gallery, clips, monkeypatch):
    add_filmed(gallery, "gate/anna/100", "gate/ben/104")
    commit, late = schema.write_mark, clip_name("gate/day/x.jpg", ".jpg", START + 101)

    def committed(*values):
        save(clips, late)
        monkeypatch.setattr(schema, "write_mark", commit)
        commit(*values)

    monkeypatch.setattr(schema, "write_mark", committed)
    gallery.delete(["gate/anna/100"])
    assert not (clips / late).exists()

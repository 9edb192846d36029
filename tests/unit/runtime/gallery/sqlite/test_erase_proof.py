"""Proofs of erasures: each place that can still have a deleted row is found, and no other."""

import json
import os
import shutil
import sqlite3
import time
from contextlib import closing
from dataclasses import replace

import pytest

from tests.helpers.gallery_places import open_new, put, save, some_vectors
from tests.helpers.refused import refused
from upperson_alerts.outbox import Message
from upperson_log.chain import verify_log
from upperson_maintenance.backup import back_up
from upperson_maintenance.erase_proof import Selection, prove_erasure
from upperson_rt.errors import InputError, UsageError
from upperson_rt.gallery import Filter, Gallery
from upperson_rt.gallery.clips import clip_name, clips_dir
from upperson_rt.gallery.erasures import ERASURE_LOG
from upperson_rt.gallery.snapshots import SNAPSHOTS, Snapshot, write_snapshot
from upperson_rt.gallery.sqlite import index, list_files, lists

EVERYTHING = Selection()


@pytest.fixture
def gallery(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "_SEAL_ROWS", 64)
    with open_new(tmp_path / "gallery") as opened:
        crops = [f"gate/day/{number}.jpg" for number in range(100)]
        save(opened.crops_dir, *crops)
        frames = (clip_name(crop, ".jpg", 1000.0 * number) for number, crop in enumerate(crops))
        save(clips_dir(opened.crops_dir), *frames)
        put(opened, range(100), camera="gate", time=float, crop=crops.__getitem__)
        opened.search(some_vectors(1), 1)
        yield opened


@pytest.fixture
def backup(gallery, tmp_path):
    """A copy of before the deletions."""
    folder = tmp_path / "backups" / "monday"
    gallery.finish_erasures()
    shutil.copytree(gallery.path, folder)
    return folder.parent


def left(gallery, selection=EVERYTHING, *backups):
    places = prove_erasure(gallery, selection, backups)
    return {place.name: place.left for place in places if place.left}


def put_messages(gallery, pictures):
    """Write messages of alerts on pictures, by key."""
    with gallery.outbox(write=True) as outbox:
        for key, picture in pictures.items():
            data = {"picture": picture, "track": f"track of {key}"}
            outbox.put(Message(key=key, topic="red", time=0.0, body={"data": data}))


def last_line(gallery):
    return json.loads((gallery.path / ERASURE_LOG).read_text().splitlines()[-1])


SELECTIONS = {
    "all": lambda gallery: EVERYTHING,
    "keys": lambda gallery: Selection(keys=["k7", "k8"]),
    "filter": lambda gallery: Selection(where=Filter(since=7, until=9)),
    "erasure": lambda gallery: Selection(erasure=last_line(gallery)["erasure"]),
}


@pytest.mark.parametrize("kind", SELECTIONS)
def test_a_deletion_leaves_nothing_but_in_a_backup(gallery, backup, kind):
    gallery.delete_where(Filter(since=7, until=9))
    selection = SELECTIONS[kind](gallery)
    assert left(gallery, selection) == {}
    line = last_line(gallery)
    assert (line["action"], line["left"]) == ("proof", 0)
    assert left(gallery, selection, backup) == {"backup 1: database": 2}
    assert last_line(gallery)["places"]["backup 1: database"] == 2
    assert verify_log(gallery.path / ERASURE_LOG).problems == []
    assert "k7" not in (gallery.path / ERASURE_LOG).read_text()
    with Gallery.open(backup / "monday") as copy:
        copy.delete(["k7", "k8"])
    assert left(gallery, selection, backup) == {}


def test_what_was_not_deleted_is_found(gallery):
    gallery.delete(["k7"])
    assert left(gallery, Selection(keys=["k7", "k8"])) == {"database": 1}
    snapshot = Snapshot(camera="gate", time=50.0, width=8, height=8)
    write_snapshot(gallery.path / SNAPSHOTS, snapshot, b"jpeg")
    where = Selection(where=Filter(camera="gate", since=40, until=60))
    assert left(gallery, where) == {"database": 20, "newest frames": 1}


def test_each_place_is_looked_into(gallery):
    old_index = gallery._index.path.read_bytes()
    gallery.delete(["k7"])
    gallery._index.path.write_bytes(old_index)
    long_ago = time.time() - 7200
    for name in ("crops/gate/day/7.jpg", "clips/gate/day/707.7000.jpg"):
        save(gallery.path, name)
        os.utime(gallery.path / name, (long_ago, long_ago))
    (gallery.path / "scores.json").write_text('{"pictures": [[0.1, 0.2]]}')
    with closing(sqlite3.connect(gallery.path / "gallery.sqlite")) as other:
        other.execute("PRAGMA secure_delete = OFF")
        other.execute("CREATE TABLE large AS SELECT hex(randomblob(9000)) AS x")
        other.execute("DROP TABLE large")
        other.commit()
    found = left(gallery)
    assert found.pop("free pages") > 3
    assert found == {
        "search index": 1, "crops": 1, "frames and clips": 1, "score calibration": 1
    }  # fmt: skip
    gallery.rebuild()
    (gallery.path / "scores.json").unlink()
    gallery.prune(older_than=0.5)
    os.utime(gallery.crops_dir / "gate/day/7.jpg", (0, 0))
    assert "search index" not in left(gallery)


def test_a_centroid_of_other_pictures_is_found(gallery, monkeypatch):
    monkeypatch.setattr(index, "APPROXIMATE_FROM", 50)
    monkeypatch.setattr(list_files, "SEAL_ROWS", 50)
    gallery.rebuild()
    gallery.delete(["k7"])
    assert left(gallery) == {}
    files = gallery._index._files
    (name,) = files.read().parts
    part = files.read_part(name)
    made = lists.load_faiss().read_index(str(gallery.path / name))
    centroids = made.quantizer.reconstruct_n(0, made.nlist)
    centroids[2] += 0.001
    made.quantizer.reset()
    made.quantizer.add(centroids)
    lists.write_part(gallery.path / name, replace(part, index=made), gallery.database.meta.identity)
    assert left(gallery) == {"index centroids": 1}
    gallery.rebuild()
    assert left(gallery) == {}


def test_a_damaged_index_is_found_in_a_copy_and_removed_here(gallery, backup):
    for folder in (gallery.path, backup / "monday"):
        (folder / "gallery.index").write_bytes(b"damaged")
    assert left(gallery, EVERYTHING, backup) == {"backup 1: search index": 1}
    assert not gallery._index.path.exists()


def test_unfinished_files_of_killed_processes_go(gallery, backup):
    names = f"{SNAPSHOTS}/.c1.jpg.abcdefgh", "clips/.unfinished.abcdefgh.tmp/clip.mp4"
    for folder in (gallery.path, backup / "monday"):
        save(folder, *names)
    found = {"backup 1: frames and clips": 1, "backup 1: newest frames": 1}
    assert left(gallery, EVERYTHING, backup) == found
    assert not any((gallery.path / name).exists() for name in names)


def test_messages_of_deleted_pictures_are_found(gallery, backup):
    with Gallery.open(backup / "monday") as copy:
        put_messages(copy, {"there": 1, "gone": 999})
        assert left(gallery, EVERYTHING, backup) == {"backup 1: alerts": 1}
        assert left(copy) == {}  # It finishes what is left.
    assert left(gallery, EVERYTHING, backup) == {}


def test_a_backup_has_no_message_of_what_is_in_the_bin(gallery, tmp_path):
    put_messages(gallery, gallery.ids(["k7", "k8"]))
    gallery.bin.add(["k7"], "ada", "why")
    for is_increment in (False, True):
        assert back_up(gallery.path, tmp_path / "backup").is_increment == is_increment
        assert left(gallery, EVERYTHING, tmp_path / "backup") == {}
        stored = (tmp_path / "backup/gallery.sqlite").read_bytes()
        assert (b"track of k7" in stored, b"track of k8" in stored) == (False, True)
    with gallery.outbox() as outbox:
        assert len(outbox.messages()) == 2


@pytest.mark.parametrize("kind", ["all", "keys", "filter"])
def test_the_bin_is_looked_into(gallery, backup, tmp_path, kind):
    gallery.bin.add(["k7", "k8", "k60"], "ada", "why")
    save(gallery.bin.crops_dir, "stray.jpg")
    assert left(gallery, EVERYTHING, backup) == {}, "what waits there was not erased"
    assert not (gallery.bin.crops_dir / "stray.jpg").exists()
    selection, copies = SELECTIONS[kind](gallery), tmp_path / "copies"
    # Two rows, each with a crop and a frame, and the frame k0, which was taken at their time.
    binned = {} if kind == "all" else {"bin": 7}
    assert left(gallery, selection) == binned
    shutil.copytree(gallery.path, copies / "monday")
    assert gallery.delete(["k7", "k8"]) == 2
    erasure = last_line(gallery)["erasure"]
    assert left(gallery, selection) == {}
    for one in (selection, Selection(erasure=erasure)):
        assert left(gallery, one, copies) == {"backup 1: bin": 7}
    with Gallery.open(copies / "monday") as copy:
        copy.delete(["k7", "k8"])
    assert left(gallery, selection, copies) == {}
    save(copies / "monday/bin", "crops/gate/day/707.jpg", "clips/gate/day/707.7000.jpg")
    assert left(gallery, selection, copies) == {"backup 1: bin": 2}


def test_a_reader_keeps_the_log_and_a_file_that_stays_is_named(gallery, monkeypatch):
    with gallery.database.reading():
        put(gallery, ["new"])
        assert left(gallery)["SQLite's log"] > 0
    assert left(gallery) == {}
    with monkeypatch.context() as patched:
        patched.setattr("upperson_rt.gallery.sqlite.deletion.remove_crops", lambda _, crops: crops)
        gallery.delete(["k7"])
        assert left(gallery) == {"crops": 1}
    assert left(gallery) == {}
    assert not (gallery.crops_dir / "gate/day/7.jpg").exists()


def test_what_cannot_be_proven_is_refused(gallery, backup, tmp_path):
    gallery.delete(["k7"])
    before = (gallery.path / ERASURE_LOG).read_bytes()
    with refused("erasure_unknown", InputError):
        prove_erasure(gallery, Selection(erasure="0" * 32))
    (tmp_path / "empty").mkdir()
    with refused("backup_not_found", InputError):
        prove_erasure(gallery, EVERYTHING, [tmp_path / "empty"])
    open_new(tmp_path / "other").close()
    with refused("backup_of_another", InputError):
        prove_erasure(gallery, EVERYTHING, [tmp_path / "other"])
    with refused("selections_conflict", UsageError):
        Selection(keys=["a"], where=Filter(camera="b"))
    assert (gallery.path / ERASURE_LOG).read_bytes() == before
    assert left(gallery, Selection(keys=["k7"]), tmp_path / "other") == {}


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (os.mkfifo, "file_unreadable"),
        (os.mkdir, "file_unreadable"),
        (lambda path: (path.touch(), os.truncate(path, 1 << 40)), "file_too_large"),
    ],
)
def test_a_log_that_is_no_file_of_lines_is_not_read(gallery, make, code):
    log = gallery.path / ERASURE_LOG
    log.unlink(missing_ok=True)
    make(log)
    with refused(code, InputError, path=str(log)):
        prove_erasure(gallery, Selection(erasure="abc"))

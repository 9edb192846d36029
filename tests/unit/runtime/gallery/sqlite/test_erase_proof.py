"""Proofs of erasures: each place that can still have a deleted row is found, and no other."""

import json
import os
import shutil
import sqlite3
import time
from contextlib import closing

import pytest

from tests.helpers.gallery_places import DIM, FINGERPRINT, some_vectors
from tests.helpers.refused import refused
from upperson_alerts.outbox import Message
from upperson_log.chain import verify_log
from upperson_maintenance.backup import back_up
from upperson_maintenance.erase_proof import Selection, prove_erasure
from upperson_rt.errors import InputError, UsageError
from upperson_rt.gallery import Filter, Gallery, Item
from upperson_rt.gallery.clips import clip_name, clips_dir
from upperson_rt.gallery.erasures import ERASURE_LOG
from upperson_rt.gallery.snapshots import SNAPSHOTS, Snapshot, write_snapshot
from upperson_rt.gallery.sqlite import index

EVERYTHING = Selection()


@pytest.fixture
def gallery(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "_SEAL_ROWS", 64)
    with Gallery.open(tmp_path / "gallery", FINGERPRINT, DIM, create=True) as opened:
        items = []
        for number in range(100):
            crop = f"gate/day/{number}.jpg"
            items.append(Item(key=f"k{number}", camera="gate", time=float(number), crop=crop))
            for file in (
                opened.crops_dir / crop,
                clips_dir(opened.crops_dir) / clip_name(crop, ".jpg", 1000.0 * number),
            ):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(b"jpeg")
        opened.add(items, some_vectors(100))
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
    return {
        place.name: place.left for place in prove_erasure(gallery, selection, backups) if place.left
    }


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
    for file in (
        gallery.crops_dir / "gate/day/7.jpg",
        clips_dir(gallery.crops_dir) / clip_name("gate/day/707.jpg", ".jpg", 7.0),
    ):
        file.write_bytes(b"jpeg")
        os.utime(file, (long_ago, long_ago))
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
    gallery._index.path.write_bytes(b"damaged")
    assert left(gallery)["search index"] == 1
    gallery.rebuild()
    (gallery.path / "scores.json").unlink()
    gallery.prune(older_than=0.5)
    os.utime(gallery.crops_dir / "gate/day/7.jpg", (0, 0))
    assert "search index" not in left(gallery)


def test_messages_of_deleted_pictures_are_found(gallery, backup):
    with Gallery.open(backup / "monday") as copy:
        with copy.outbox(write=True) as outbox:
            for number in (1, 999):
                data = {"picture": number, "camera": "gate"}
                outbox.put(Message(key=str(number), topic="red", time=0.0, body={"data": data}))
        assert left(gallery, EVERYTHING, backup) == {"backup 1: alerts": 1}
        assert left(copy) == {}  # It finishes what is left.
    assert left(gallery, EVERYTHING, backup) == {}


def test_a_backup_has_no_message_of_what_is_in_the_bin(gallery, tmp_path):
    with gallery.outbox(write=True) as outbox:
        for key, picture in gallery.ids(["k7", "k8"]).items():
            data = {"picture": picture, "track": f"track of {key}"}
            outbox.put(Message(key=key, topic="red", time=0.0, body={"data": data}))
    gallery.bin.add(["k7"], "ada", "why")
    for is_increment in (False, True):
        assert back_up(gallery.path, tmp_path / "backup").is_increment == is_increment
        assert left(gallery, EVERYTHING, tmp_path / "backup") == {}
        stored = (tmp_path / "backup/gallery.sqlite").read_bytes()
        assert (b"track of k7" in stored, b"track of k8" in stored) == (False, True)
    with gallery.outbox() as outbox:
        assert len(outbox.messages()) == 2


@pytest.mark.parametrize("kind", ["all", "keys", "filter"])
def test_the_bin_is_looked_into(gallery, tmp_path, kind):
    gallery.bin.add(["k7", "k8", "k60"], "ada", "why")
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
    (copies / "monday/bin/crops/gate/day/707.jpg").write_bytes(b"jpeg")
    (copies / "monday/bin/clips/gate/day/707.7000.jpg").write_bytes(b"jpeg")
    assert left(gallery, selection, copies) == {"backup 1: bin": 2}


def test_what_waits_in_the_bin_was_not_erased(gallery, backup):
    gallery.bin.add(["k7"], "ada", "why")
    (gallery.bin.crops_dir / "stray.jpg").write_bytes(b"jpeg")
    assert left(gallery, EVERYTHING, backup) == {}
    assert not (gallery.bin.crops_dir / "stray.jpg").exists()


def test_a_reader_keeps_the_log_and_a_file_that_stays_is_named(gallery, monkeypatch):
    with gallery.database.reading():
        gallery.add([Item(key="new")], some_vectors(1))
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
    Gallery.open(tmp_path / "other", FINGERPRINT, DIM, create=True).close()
    with refused("backup_of_another", InputError):
        prove_erasure(gallery, EVERYTHING, [tmp_path / "other"])
    with refused("selections_conflict", UsageError):
        Selection(keys=["a"], where=Filter(camera="b"))
    assert (gallery.path / ERASURE_LOG).read_bytes() == before
    assert left(gallery, Selection(keys=["k7"]), tmp_path / "other") == {}

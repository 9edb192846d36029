"""Deletions in steps: what others see meanwhile, what a crash leaves, and what the log says."""

import json
import sqlite3
from contextlib import closing

import numpy as np
import pytest

from tests.helpers.gallery_places import open_new, put, save, some_vectors
from tests.helpers.refused import refused
from upperson_log.chain import verify_log
from upperson_rt.errors import InputError
from upperson_rt.gallery import Filter, Gallery, Item
from upperson_rt.gallery.erasures import ERASURE_LOG, digest_of_keys, pack_ids, unpack_ids
from upperson_rt.gallery.sqlite import deletion, free_pages, index

ROWS = 100


@pytest.fixture
def steps(monkeypatch):
    """Steps of ten rows without a pause; what is appended is called between two of them."""
    between = []
    monkeypatch.setattr(deletion, "STEP_ROWS", 10)
    monkeypatch.setattr(deletion.time, "sleep", lambda _: [call() for call in between])
    return between


@pytest.fixture
def gallery(tmp_path, steps):
    with open_new(tmp_path / "gallery") as opened:
        fill(opened, ROWS)
        yield opened


def fill(gallery, count, start=0):
    items = [
        Item(key=f"person-{n}", camera=f"c{n % 2}", time=n, crop=f"c{n % 2}/day/person-{n}.jpg")
        for n in range(start, start + count)
    ]
    save(gallery.crops_dir, *(item.crop for item in items))
    gallery.add(items, some_vectors(count, start))


def crops(gallery):
    return sorted(int(file.stem.split("-")[1]) for file in gallery.crops_dir.rglob("*.jpg"))


def lines(gallery):
    file = gallery.path / ERASURE_LOG
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def log_bytes(gallery):
    return (gallery.path / "gallery.sqlite-wal").stat().st_size


def test_others_read_and_write_between_two_steps(gallery, steps):
    seen = []

    def use():
        with Gallery.open(gallery.path) as other:
            seen.append(other.count())
            put(other, [f"new-{len(seen)}"], time=1.0)
            put(other, ["person-59"], time=59.0)  # Replaced meanwhile.

    steps.append(use)
    assert gallery.prune(older_than=60) == 59
    assert seen == [90, 81, 72, 63, 54]
    assert gallery.verify() == []
    assert gallery.count() == 40 + 1 + 5
    assert crops(gallery) == [*range(60, 100)]


def test_two_prunings_at_once_delete_each_row_once(gallery, steps):
    counts = []

    def prune():
        steps.clear()
        with Gallery.open(gallery.path) as other:
            counts.append(other.prune(older_than=60))

    steps.append(prune)
    counts.append(gallery.prune(older_than=60))
    assert sorted(counts) == [10, 50]
    counts = {(line["erasure"], line["step"]): line["count"] for line in lines(gallery)}
    assert sum(counts.values()) == 60  # One of the lines may be there twice.
    assert gallery.verify() == []


def test_the_log_has_digests_and_row_numbers_only(gallery):
    ids = sorted(gallery.ids([f"person-{n}" for n in range(0, 60, 2)]).values())
    assert gallery.prune(older_than=60, camera="c0") == 30
    assert gallery.delete(["person-99", "nothing"]) == 1
    assert gallery.delete(["nothing"]) == 0
    report = verify_log(gallery.path / ERASURE_LOG)
    assert (report.lines, report.problems) == (4, [])
    *pruned, deleted = lines(gallery)
    assert {line["erasure"] for line in pruned} != {deleted["erasure"]}
    found = [(line["action"], line["step"], line["count"]) for line in pruned]
    assert found == [("prune", step, 10) for step in range(3)]
    assert pruned[0]["about"] == {"camera": "c0", "until": 60.0, "keep_newest": None}
    assert (pruned[0]["first_time"], pruned[2]["last_time"]) == (0.0, 58.0)
    assert np.concatenate([unpack_ids(line["ids"]) for line in pruned]).tolist() == ids
    assert deleted["keys_sha256"] == digest_of_keys(deleted["gallery"], ["person-99"])
    assert "person" not in (gallery.path / ERASURE_LOG).read_text()


@pytest.mark.parametrize(("call", "written", "rest"), [("_finish", 1, 50), ("_tidy", 6, 0)])
def test_the_next_deletion_finishes_one_that_ended_early(gallery, monkeypatch, call, written, rest):
    with monkeypatch.context() as patched:
        patched.setattr(deletion.Eraser, call, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gallery.prune(older_than=60)
    with Gallery.open(gallery.path) as again:
        assert again.delete(["nothing"]) == 0
        assert crops(again) == [int(item.key.split("-")[1]) for item in again.items()]
        assert len(lines(again)) == written
        assert lines(again)[-1].get("recovered", False) == (call == "_finish")
        assert again.prune(older_than=60) == rest
        assert again.finish_erasures()
        assert again.verify() == []
    content = b"".join(file.read_bytes() for file in gallery.path.glob("*sqlite*"))
    assert b"erasing/" not in content
    assert b"person-7." not in content


def test_a_log_that_cannot_be_written_is_written_later(gallery):
    log = gallery.path / ERASURE_LOG
    log.mkdir()
    with refused("log_unwritable", InputError):
        gallery.delete(["person-7"])
    assert (gallery.count(), 7 in crops(gallery)) == (ROWS - 1, False)
    log.rmdir()
    assert gallery.delete(["person-8"]) == 1
    assert [line["count"] for line in lines(gallery)] == [1, 1]


def test_nothing_of_a_deleted_row_is_left_in_a_file(gallery, monkeypatch):
    monkeypatch.setattr(index, "_SEAL_ROWS", 64)
    gallery.search(some_vectors(1), 1)
    vector = some_vectors(ROWS)[7].astype("<f2").tobytes()

    def left():
        files = [file for file in gallery.path.rglob("*") if file.is_file()]
        content = b"".join(file.name.encode() + file.read_bytes() for file in files)
        return vector in content, b"person-7." in content

    assert left() == (True, True)
    gallery.delete(["person-7"])
    assert log_bytes(gallery) == 0
    assert left() == (False, False)
    assert len(gallery.search(some_vectors(1), ROWS)[0]) == ROWS - 1
    with gallery._database.reading():  # A reader keeps the log: the next deletion empties it.
        gallery.delete(["person-8"])
        assert log_bytes(gallery) > 0
    gallery.delete(["person-9"])
    assert log_bytes(gallery) == 0


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(deletion, "_SPARE_PAGES", 4)
    monkeypatch.setattr(deletion, "STEP_ROWS", 1000)


@pytest.mark.parametrize("punches", [True, False])
def test_free_space_goes_back_to_the_file_system(gallery, quick, monkeypatch, punches):
    """As holes; the file is cut where more than half is free, or where holes are not possible."""
    if not punches:
        monkeypatch.setattr(free_pages, "_punch", lambda *_: False)
    monkeypatch.setattr(deletion, "_STEP_S", 0.002)
    fill(gallery, 3000, ROWS)
    file = gallery.path / "gallery.sqlite"
    assert gallery.prune(keep_newest=3000) == 100
    before = file.stat()
    assert gallery.prune(keep_newest=2000) == 1000
    assert (file.stat().st_size == before.st_size) == punches
    assert file.stat().st_blocks < 0.9 * before.st_blocks
    assert gallery.prune(keep_newest=300) == 1700
    assert file.stat().st_size < before.st_size / 2
    assert gallery.verify() == []


def test_a_gallery_of_an_earlier_release_gives_space_back_after_one_command(gallery, quick):
    """The command of docs/how-to/gallery.md."""
    gallery.close()
    file = gallery.path / "gallery.sqlite"
    for mode, shrinks in ((0, False), (2, True)):
        with closing(sqlite3.connect(file)) as connection:
            connection.execute(f"PRAGMA auto_vacuum = {mode}")
            connection.execute("VACUUM")
        with Gallery.open(gallery.path) as opened:
            fill(opened, 2000, 1000)
            opened.delete([f"person-{mode}"])  # Empties the log.
            before = file.stat().st_size
            assert opened.delete_where(Filter(since=1000)) == 2000
            assert (file.stat().st_size < before / 2) == shrinks
            assert opened.verify() == []


def test_row_numbers_are_packed():
    for numbers in ([1, 2, 3, 900, 2**40], [*range(1, 100_001)]):
        assert unpack_ids(pack_ids(np.array(numbers, np.int64))).tolist() == numbers
    for wrong in ("", "?", "AAAA", None):
        with refused("erasure_malformed", InputError):
            unpack_ids(wrong)

"""The bin of a gallery: what is deleted can be restored, with its id, until it is emptied."""

import errno
import json
import os
import subprocess
import sys
import time

import pytest

from tests.helpers.command_line import environment
from tests.helpers.gallery_places import START, add_filmed, open_new, put, save, some_vectors, sql
from tests.helpers.refused import refused
from upperson_log.chain import verify_log
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.gallery import Filter, Gallery
from upperson_rt.gallery.clips import clips_dir
from upperson_rt.gallery.erasures import ERASURE_LOG, digest_of_keys, unpack_ids
from upperson_rt.gallery.sqlite import database, list_files
from upperson_rt.gallery.sqlite import index as index_module
from upperson_rt.gallery.sqlite.bin import Bin, empty_bin
from upperson_rt.locks import locked_folder

ANNA, LATER = "gate/anna/100", "gate/anna/120"


def move(gallery, *keys):
    """Move items into the bin; return how many."""
    return gallery.bin.add(keys, "ada", "by mistake")


def binned(gallery):
    return [entry.item.key for entry in gallery.bin.entries()]


def restore(gallery):
    return gallery.bin.restore([entry.id for entry in gallery.bin.entries()])


def rows(gallery):
    """Everything that a gallery holds: rows by id, with vectors, and files with their content."""
    found = gallery.get([*gallery.ids([item.key for item in gallery.items()]).values()])
    items = {id_: (item, vector.tobytes()) for id_, (item, vector) in found.items()}
    return items, files(gallery.path), gallery.info().variants


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith("gallery.")
    }


def places_of(gallery, name):
    """The folders that have files with a name, one for each file."""
    return sorted(one.partition("/")[0] for one in files(gallery.path) if name in one)


def erasures(gallery):
    file = gallery.path / ERASURE_LOG
    assert verify_log(file).problems == []
    return [json.loads(line) for line in file.read_text().splitlines()]


def failing(number):
    """A call of the system that fails."""

    def call(*_):
        raise OSError(number, os.strerror(number), "new")

    return call


def assert_sound(gallery):
    assert gallery.verify() == []
    gallery.check()


@pytest.mark.parametrize("has_links", [True, False])
def test_what_is_restored_is_as_it_was(gallery, monkeypatch, has_links):
    if not has_links:
        monkeypatch.setattr(os, "link", failing(errno.EPERM))
    add_filmed(gallery, ANNA, LATER, "gate/ben/5000", "hall/eve/100")
    before = rows(gallery)
    began = time.time()
    assert move(gallery, ANNA, LATER) == 2
    assert gallery.count() == 2
    assert gallery.ids([ANNA, LATER]) == {}
    assert gallery.by_camera().keys() == {"gate", "hall"}
    assert not any(hit.item.track == "anna" for hit in gallery.search(some_vectors(1), 10)[0])
    (entry, other) = gallery.bin.entries()
    assert entry.item == before[0][entry.id][0]
    assert (entry.user, entry.reason) == ("ada", "by mistake")
    assert began <= entry.deleted == other.deleted <= time.time()
    assert places_of(gallery, "anna") == ["bin"] * 6
    assert_sound(gallery)
    assert gallery.bin.restore([entry.id, other.id, 999]) == 2
    assert rows(gallery) == before
    assert gallery.bin.entries() == []
    assert_sound(gallery)


def test_frames_and_clips_stay_while_they_show_somebody_in_the_bin(gallery):
    add_filmed(gallery, ANNA, "gate/ben/103", "gate/carl/9000")
    before = rows(gallery)
    anna, ben = gallery.ids([ANNA, "gate/ben/103"]).values()
    move(gallery, ANNA)
    # Ben's frame and clip of that time may show Anna; his crop does not.
    assert places_of(gallery, "ben") == ["bin", "bin", "crops"]
    move(gallery, "gate/ben/103")
    gallery.bin.restore([anna])
    assert places_of(gallery, "anna") == ["bin", "bin", "crops"]
    gallery.bin.restore([ben])
    restored = rows(gallery)
    # What showed both came back with the second.
    assert {name for name in before[1] if "ben" in name} <= restored[1].keys()
    assert restored[0] == before[0]


def test_a_track_of_two_deletions_does_not_stand_for_the_time_between(gallery):
    add_filmed(gallery, "gate/1/100", "gate/2/50000", "gate/1/90000")
    for act in (
        lambda: (move(gallery, "gate/1/100"), move(gallery, "gate/1/90000")),
        gallery.bin.delete,
    ):
        act()
        assert len([*clips_dir(gallery.crops_dir).glob("gate/day/2-*")]) == 2


def test_emptying_removes_rows_files_and_what_shows_them(gallery):
    add_filmed(gallery, ANNA, "gate/ben/5000", "hall/eve/100")
    move(gallery, ANNA)
    between = time.time()
    move(gallery, "hall/eve/100")
    late = "clips/gate/day/ben-5000.1790000101000.jpg"
    save(gallery.path, late, content=b"Anna, written when she was in the bin")
    assert len(gallery.bin.entries(before=between)) == 1
    assert empty_bin(gallery, between) == 1
    assert empty_bin(gallery, between) == 0
    assert not (gallery.path / late).exists()
    assert binned(gallery) == ["hall/eve/100"]
    assert places_of(gallery, "anna") == []
    assert ANNA.encode() not in (gallery.path / "gallery.sqlite").read_bytes()
    assert empty_bin(gallery, time.time() + 1) == 1
    assert "bin" not in places_of(gallery, "")
    assert_sound(gallery)


def test_a_final_deletion_is_in_the_log_and_leaves_no_vector(gallery, monkeypatch):
    monkeypatch.setattr(index_module, "_SEAL_ROWS", 1)
    names = [ANNA, LATER, "hall/eve/100"]
    add_filmed(gallery, *names)
    gallery.search(some_vectors(1), 1)  # Saves an index.
    ids = [*gallery.ids(names).values()]
    stored = some_vectors(1, len(ANNA) + 100).astype("<f2").tobytes()

    def left():
        return stored in b"".join(path.read_bytes() for path in gallery.path.glob("gallery.*"))

    move(gallery, *names)
    assert left()
    assert gallery.bin.delete(ids[:2]) == 2
    assert not left()
    assert (gallery.path / "gallery.sqlite-wal").stat().st_size == 0
    gallery.delete_where(Filter(camera="hall"))
    first, second = erasures(gallery)
    assert [first[name] for name in ("action", "about", "count")] == ["delete", {"bin": True}, 2]
    assert unpack_ids(first["ids"]).tolist() == ids[:2]
    assert first["keys_sha256"] == digest_of_keys(first["gallery"], names[:2])
    assert (first["first_time"], first["last_time"]) == (START + 100, START + 120)
    assert "recovered" not in first
    assert second["about"] == {"camera": "hall", "bin": True}
    assert gallery.bin.delete() == 0
    assert len(erasures(gallery)) == 2


def test_a_final_deletion_also_empties_the_bin(gallery):
    keys = [f"gate/anna/{second}" for second in (1, 2, 3, 4, 5)]
    add_filmed(gallery, *keys)
    move(gallery, *keys[:4])
    assert gallery.delete(keys[:1]) == 1
    assert binned(gallery) == keys[3:0:-1]
    assert gallery.delete_where(Filter(camera="gate", until=START + 2.5)) == 1
    assert binned(gallery) == keys[3:1:-1]
    gallery.prune(older_than=START + 3.5)
    assert [entry.item.key for entry in gallery.bin.entries(most=1)] == keys[3:4]
    gallery.prune(keep_newest=0)
    assert gallery.bin.entries(start=1) == []


def test_a_key_that_came_again_is_not_replaced(gallery):
    add_filmed(gallery, ANNA, "gate/ben/100")
    move(gallery, ANNA, "gate/ben/100")
    put(gallery, [ANNA], 9)
    before = rows(gallery), gallery.bin.entries()
    with refused("key_taken", InputError, key=ANNA):
        restore(gallery)
    assert (rows(gallery), gallery.bin.entries()) == before
    # Both may be in the bin; they do not come back together.
    move(gallery, ANNA)
    with refused("key_taken"):
        restore(gallery)
    assert gallery.bin.restore([gallery.bin.entries()[0].id]) == 1
    assert_sound(gallery)


def test_files_of_the_same_name_are_not_mixed_up(gallery):
    for content in (b"first", b"second"):
        save(gallery.crops_dir, "one.jpg", content=content)
        put(gallery, ["one"], crop="one.jpg")
        if content == b"first":
            move(gallery, "one")
    with refused("bin_files", InputError):
        move(gallery, "one")
    assert (gallery.crops_dir / "one.jpg").read_bytes() == b"second"
    assert (gallery.bin.crops_dir / "one.jpg").read_bytes() == b"first"
    assert (gallery.count(), len(gallery.bin.entries())) == (1, 1)


def test_a_crop_of_two_items_stays_for_the_other(gallery):
    add_filmed(gallery, ANNA)
    (item,) = gallery.items()
    put(gallery, ["other"], 2, crop=item.crop)
    for first in (ANNA, "other"):
        move(gallery, first)
        assert (gallery.crops_dir / item.crop).exists() == (first == ANNA)
        assert (gallery.bin.crops_dir / item.crop).exists()
    gallery.delete([ANNA])
    assert (gallery.bin.crops_dir / item.crop).exists()
    gallery.bin.delete()
    assert not [name for name in files(gallery.path) if "/" in name]


def test_a_full_disk_loses_nothing(gallery, monkeypatch):
    add_filmed(gallery, ANNA, "gate/ben/103")
    before = rows(gallery)

    for act, left in ((lambda: move(gallery, ANNA), [ANNA]), (lambda: restore(gallery), [])):
        with monkeypatch.context() as patch:
            for name in ("link", "replace"):
                patch.setattr(os, name, failing(errno.ENOSPC))
            with refused("cannot_write", InputError):
                act()
        gallery.bin.tidy()
        assert binned(gallery) == left
        assert ({*places_of(gallery, "anna")} == {"bin"}) == bool(left)
    assert rows(gallery) == before


@pytest.mark.parametrize("is_large", [False, True])
def test_indexes_follow_a_restoration(gallery, monkeypatch, caplog, is_large):
    for module, name in ((index_module, "_SEAL_ROWS"), (list_files, "SEAL_ROWS")):
        monkeypatch.setattr(module, name, 64)
    if is_large:
        monkeypatch.setattr(index_module, "APPROXIMATE_FROM", 200)
    put(gallery, range(300), camera="gate", time=START)
    vectors = some_vectors(300)
    gallery.rebuild()

    def found(opened=gallery):
        best = [hits[0].id for hits in opened.search(vectors, 5)]
        passing = opened.search(vectors, 5, Filter(camera="gate", since=START - 1))
        assert [hits[0].id for hits in passing] == best
        return best

    before = found()
    for _ in range(2):
        move(gallery, *(f"k{n}" for n in range(0, 300, 7)))
        assert {*found()} == {before[n] for n in range(300) if n % 7}
        with Gallery.open(gallery.path) as opened:
            restore(gallery)
            assert found() == found(opened) == before
    gallery.rebuild()
    with Gallery.open(gallery.path) as opened:
        assert found(opened) == before
    assert_sound(gallery)
    assert not [line for line in caplog.messages if "not of this database" in line]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ("vector = zeroblob(32)", "vector of length 0.0"),
        ("camera = 'yard'", "its metadata was altered"),
        ("user = user", "is missing"),
    ],
)
def test_a_gallery_is_verified_with_its_bin(gallery, change, wrong):
    add_filmed(gallery, ANNA, "gate/ben/200")
    move(gallery, ANNA)
    assert gallery.verify() == []
    sql(gallery.path, f"UPDATE bin SET {change}")
    if wrong == "is missing":
        for crop in gallery.bin.crops_dir.glob("gate/**/*.jpg"):
            crop.unlink()
    (problem,) = gallery.verify()
    assert problem.startswith(f"bin: item {ANNA}: ")
    assert wrong in problem
    if "vector" in change:
        with refused("vector_altered", IntegrityError):
            restore(gallery)
        assert len(gallery.bin.entries()) == 1


KILLED = """
import os, shutil, sys
from upperson_rt.gallery import Gallery
from upperson_rt.gallery.sqlite import access

whole, what = sys.argv[1:]
left = 1 << 30

def counted(call):
    def wrapped(*given, **more):
        global left
        left -= not any(str(one).startswith(("SELECT", "PRAGMA")) for one in given)
        if left < 0:
            os.kill(os.getpid(), 9)
        return call(*given, **more)
    return wrapped

def change(folder):
    with Gallery.open(folder) as gallery:
        ids = [entry.id for entry in gallery.bin.entries()]
        if what == "add":
            gallery.bin.add(["gate/anna/100", "gate/anna/120"], "ada", "why")
        elif what == "restore":
            gallery.bin.restore(ids)
        else:
            gallery.bin.delete(ids)

os.fsync = lambda file: None
for name in ("link", "rename", "unlink"):
    setattr(os, name, counted(getattr(os, name)))
for name in ("execute", "executemany"):
    setattr(access._Connection, name, counted(getattr(access._Connection, name)))
for steps in range(100):
    folder = f"{whole}-{steps}"
    shutil.copytree(whole, folder)
    child = os.fork()
    if child == 0:
        left = steps
        change(folder)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
"""


@pytest.mark.timeout(180)
@pytest.mark.parametrize("what", ["add", "restore", "delete"])
def test_after_a_kill_the_next_opening_goes_on(in_memory, monkeypatch, what):
    whole = in_memory / "whole"
    with open_new(whole) as gallery:
        add_filmed(gallery, ANNA, LATER, "gate/ben/110", "hall/eve/100")
        all_in = rows(gallery)
        if what != "add":
            move(gallery, ANNA, LATER)
    command = [sys.executable, "-c", KILLED, str(whole), what]
    subprocess.run(command, env=environment(), check=True)
    folders = [*in_memory.glob("whole-*")]
    with monkeypatch.context() as patch:
        patch.setattr(database, "_is_writable", lambda _: False)
        for folder in folders:
            before = files(folder)
            with Gallery.open(folder) as gallery:
                assert gallery.verify() == []
            assert files(folder) == before
    outcomes = [_after_a_kill(folder, all_in, what) for folder in folders]
    assert 10 < len(outcomes) < 100
    assert {*outcomes} == ({(4, 0), (2, 2)} if what != "delete" else {(2, 2), (2, 0)})


def _after_a_kill(folder, all_in, what):
    """The pictures in the gallery and in the bin; all files are where they belong."""
    with Gallery.open(folder) as gallery:
        state = gallery.count(), len(gallery.bin.entries())
        assert gallery.verify() == []
        assert not (folder / "bin" / "moving").exists()
        if state == (2, 0):
            gallery.finish_erasures()
            assert {line["count"] for line in erasures(gallery)} == {2}
        anna = {"bin"} if state[1] else set() if what == "delete" else {"crops", "clips"}
        assert {*places_of(gallery, "anna")} == anna
        restore(gallery)
        if state != (2, 0):
            assert rows(gallery)[0] == all_in[0]
            assert what == "delete" or rows(gallery)[1] == all_in[1]
    return state


def test_a_move_of_another_process_is_left_to_it(gallery, monkeypatch):
    add_filmed(gallery, ANNA)
    put(gallery, ["no time"], 2, crop="old.jpg")
    save(gallery.crops_dir, "old.jpg")
    for path in gallery.crops_dir.rglob("*.jpg"):
        os.utime(path, (1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(Bin, "_settle", lambda _: None)
        move(gallery, ANNA, "no time")
    with locked_folder(gallery.path / "bin"), Gallery.open(gallery.path) as opened:
        opened.prune(older_than=START)
        assert "bin" not in {*places_of(opened, "anna"), *places_of(opened, "old")}
        assert_sound(opened)
    with Gallery.open(gallery.path) as opened:
        assert {*places_of(opened, "anna"), *places_of(opened, "old")} == {"bin"}
        assert_sound(opened)


def test_a_move_that_cannot_be_finished_keeps_no_one_from_the_gallery(gallery, monkeypatch):
    add_filmed(gallery, ANNA)
    monkeypatch.setattr(os, "unlink", failing(errno.EACCES))
    with refused("bin_files", InputError):
        move(gallery, ANNA)
    with Gallery.open(gallery.path) as opened:
        assert binned(opened) == [ANNA]
        assert_sound(opened)
    monkeypatch.undo()
    Gallery.open(gallery.path).close()
    assert {*places_of(gallery, "anna")} == {"bin"}

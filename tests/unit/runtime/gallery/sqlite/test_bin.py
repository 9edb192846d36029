"""The bin of a gallery: what is deleted can be restored, with its id, until it is emptied."""

import errno
import json
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.helpers.command_line import environment
from tests.helpers.refused import refused
from upperson_log.chain import verify_log
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.gallery import Filter, Gallery, Item
from upperson_rt.gallery.clips import clip_name, clips_dir
from upperson_rt.gallery.crops import name_with_hash
from upperson_rt.gallery.erasures import ERASURE_LOG, digest_of_keys, unpack_ids
from upperson_rt.gallery.sqlite import bin as bin_module
from upperson_rt.gallery.sqlite import index as index_module
from upperson_rt.gallery.sqlite import list_files
from upperson_rt.gallery.sqlite.bin import empty_bin

START = 1_790_000_000.0
DIM = 8


def unit(seed):
    vector = np.random.default_rng(seed).normal(size=DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


def add(gallery, *names, variant="int8"):
    """Add pictures ``CAMERA/TRACK/SECONDS`` with crop, frame and a clip of 10 s."""
    for name in names:
        camera, track, seconds = name.split("/")
        at, content = START + float(seconds), name.encode()
        crop = f"{camera}/day/{name_with_hash(f'{track}-{seconds}', content)}"
        clips = clips_dir(gallery.crops_dir)
        for path in (
            gallery.crops_dir / crop,
            clips / clip_name(crop, ".jpg", at),
            clips / clip_name(crop, ".mp4", at - 5, at + 5),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        item = Item(
            key=name, camera=camera, track=track, time=at, crop=crop, box=(1, 2, 3, 4),
            attributes={"floor": 2, "deleted": "no"},
        )  # fmt: skip
        gallery.add([item], unit(len(name) + int(float(seconds)))[None], variant)


@pytest.fixture
def gallery(tmp_path):
    with Gallery.open(tmp_path / "gallery", "toy", DIM, create=True) as opened:
        yield opened


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


def erasures(gallery):
    file = gallery.path / ERASURE_LOG
    assert verify_log(file).problems == []
    return [json.loads(line) for line in file.read_text().splitlines()]


def assert_sound(gallery):
    assert gallery.verify() == []
    gallery.check()


def test_what_is_restored_is_as_it_was(gallery):
    add(gallery, "gate/anna/100", "gate/anna/120", "gate/ben/5000", "hall/eve/100")
    before = rows(gallery)
    gone = ["gate/anna/100", "gate/anna/120"]
    began = time.time()
    assert gallery.bin.add(gone, "ada", "by mistake") == 2
    assert gallery.count() == 2
    assert gallery.ids(gone) == {}
    assert gallery.by_camera().keys() == {"gate", "hall"}
    assert not any(hit.item.track == "anna" for hit in gallery.search(unit(1)[None], 10)[0])
    (entry, other) = gallery.bin.entries()
    assert entry.item == before[0][entry.id][0]
    assert (entry.user, entry.reason) == ("ada", "by mistake")
    assert began <= entry.deleted == other.deleted <= time.time()
    kept = {name for name in files(gallery.path) if "anna" in name}
    assert all(name.startswith("bin/") for name in kept)
    assert len(kept) == 6
    assert_sound(gallery)
    assert gallery.bin.restore([entry.id, other.id, 999]) == 2
    assert rows(gallery) == before
    assert gallery.bin.entries() == []
    assert_sound(gallery)


def test_frames_and_clips_stay_while_they_show_somebody_in_the_bin(gallery):
    add(gallery, "gate/anna/100", "gate/ben/103", "gate/carl/9000")
    before = rows(gallery)
    ids = gallery.ids(["gate/anna/100", "gate/ben/103"])
    gallery.bin.add(["gate/anna/100"], "ada", "why")
    # Ben's frame and clip of that time may show Anna; his crop does not.
    there = {name for name in files(gallery.path) if "ben" in name}
    assert sorted(name.partition("/")[0] for name in there) == ["bin", "bin", "crops"]
    gallery.bin.add(["gate/ben/103"], "ada", "why")
    gallery.bin.restore([ids["gate/anna/100"]])
    assert not [*clips_dir(gallery.crops_dir).glob("gate/day/anna*")]
    assert [*gallery.crops_dir.glob("gate/day/anna*")]
    gallery.bin.restore([ids["gate/ben/103"]])
    restored = rows(gallery)
    # What showed both came back with the second.
    assert {name for name in before[1] if "ben" in name} <= restored[1].keys()
    assert restored[0] == before[0]


def test_a_track_of_two_deletions_does_not_stand_for_the_time_between(gallery):
    add(gallery, "gate/1/100", "gate/2/50000", "gate/1/90000")
    for key in ("gate/1/100", "gate/1/90000"):
        gallery.bin.add([key], "ada", "why")
    assert len([*clips_dir(gallery.crops_dir).glob("gate/day/2-*")]) == 2
    gallery.bin.delete()
    assert len([*clips_dir(gallery.crops_dir).glob("gate/day/2-*")]) == 2


def test_emptying_removes_rows_files_and_what_shows_them(gallery):
    add(gallery, "gate/anna/100", "gate/ben/5000", "hall/eve/100")
    gallery.bin.add(["gate/anna/100"], "ada", "first")
    between = time.time()
    gallery.bin.add(["hall/eve/100"], "ada", "second")
    late = clips_dir(gallery.crops_dir) / "gate/day/ben-5000.1790000101000.jpg"
    late.write_bytes(b"Anna, written when she was in the bin")
    assert len(gallery.bin.entries(before=between)) == 1
    assert empty_bin(gallery, between) == 1
    assert empty_bin(gallery, between) == 0
    assert not late.exists()
    assert [entry.item.key for entry in gallery.bin.entries()] == ["hall/eve/100"]
    assert not any("anna" in name for name in files(gallery.path))
    assert b"gate/anna/100" not in (gallery.path / "gallery.sqlite").read_bytes()
    assert empty_bin(gallery, time.time() + 1) == 1
    assert not [name for name in files(gallery.path) if name.startswith("bin/")]
    assert_sound(gallery)


def test_a_final_deletion_is_in_the_log_and_leaves_no_vector(gallery, monkeypatch):
    monkeypatch.setattr(index_module, "_SEAL_ROWS", 1)
    names = ["gate/anna/100", "gate/anna/120", "hall/eve/100"]
    add(gallery, *names)
    gallery.search(unit(1)[None], 1)  # Saves an index.
    ids = [*gallery.ids(names).values()]
    stored = unit(len(names[0]) + 100).astype("<f2").tobytes()

    def left():
        return stored in b"".join(path.read_bytes() for path in gallery.path.glob("gallery.*"))

    gallery.bin.add(names, "ada", "why")
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
    add(gallery, *(f"gate/anna/{second}" for second in (1, 2, 3, 4, 5)))
    keys = [item.key for item in gallery.items()]
    gallery.bin.add(keys[:4], "ada", "why")
    assert gallery.delete(keys[:1]) == 1
    assert [entry.item.key for entry in gallery.bin.entries()] == keys[3:0:-1]
    assert gallery.delete_where(Filter(camera="gate", until=START + 2.5)) == 1
    assert [entry.item.key for entry in gallery.bin.entries()] == keys[3:1:-1]
    gallery.prune(older_than=START + 3.5)
    assert [entry.item.key for entry in gallery.bin.entries(most=1)] == keys[3:4]
    gallery.prune(keep_newest=0)
    assert gallery.bin.entries(start=1) == []


def test_a_key_that_came_again_is_not_replaced(gallery):
    add(gallery, "gate/anna/100", "gate/ben/100")
    keys = ["gate/anna/100", "gate/ben/100"]
    ids = [*gallery.ids(keys).values()]
    gallery.bin.add(keys, "ada", "why")
    gallery.add([Item(key=keys[0])], unit(9)[None])
    before = rows(gallery), gallery.bin.entries()
    with refused("key_taken", InputError, key=keys[0]):
        gallery.bin.restore(ids)
    assert (rows(gallery), gallery.bin.entries()) == before
    # Both may be in the bin; they do not come back together.
    gallery.bin.add(keys[:1], "ada", "again")
    ids = [entry.id for entry in gallery.bin.entries()]
    with refused("key_taken"):
        gallery.bin.restore(ids)
    assert gallery.bin.restore(ids[:1]) == 1
    assert_sound(gallery)


def test_files_of_the_same_name_are_not_mixed_up(gallery):
    for content in (b"first", b"second"):
        gallery.crops_dir.mkdir(exist_ok=True)
        (gallery.crops_dir / "one.jpg").write_bytes(content)
        gallery.add([Item(key="one", crop="one.jpg")], unit(1)[None])
        if content == b"first":
            gallery.bin.add(["one"], "ada", "why")
    with refused("bin_files", InputError):
        gallery.bin.add(["one"], "ada", "why")
    assert (gallery.crops_dir / "one.jpg").read_bytes() == b"second"
    assert (gallery.bin.crops_dir / "one.jpg").read_bytes() == b"first"
    assert (gallery.count(), len(gallery.bin.entries())) == (1, 1)


def test_a_crop_of_two_items_stays_for_the_other(gallery):
    add(gallery, "gate/anna/100")
    (item,) = gallery.items()
    gallery.add([Item(key="other", crop=item.crop)], unit(2)[None])
    for first in (item.key, "other"):
        gallery.bin.add([first], "ada", "why")
        assert (gallery.crops_dir / item.crop).exists() == (first == item.key)
        assert (gallery.bin.crops_dir / item.crop).exists()
    gallery.delete([item.key])
    assert (gallery.bin.crops_dir / item.crop).exists()
    gallery.bin.delete()
    assert not [name for name in files(gallery.path) if "/" in name]


def test_a_full_disk_loses_nothing(gallery, monkeypatch):
    add(gallery, "gate/anna/100", "gate/ben/103")
    before = rows(gallery)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "new")

    with monkeypatch.context() as patch:
        patch.setattr(bin_module.shutil, "move", full)
        with refused("bin_files", InputError):
            gallery.bin.add(["gate/anna/100"], "ada", "why")
    gallery.bin.tidy()
    (entry,) = gallery.bin.entries()
    assert {name.partition("/")[0] for name in files(gallery.path) if "anna" in name} == {"bin"}
    with monkeypatch.context() as patch:
        patch.setattr(bin_module.shutil, "move", full)
        with refused("bin_files", InputError):
            gallery.bin.restore([entry.id])
    gallery.bin.tidy()
    assert rows(gallery) == before


@pytest.mark.parametrize("is_large", [False, True])
def test_indexes_follow_a_restoration(gallery, monkeypatch, caplog, is_large):
    monkeypatch.setattr(index_module, "_SEAL_ROWS", 64)
    monkeypatch.setattr(list_files, "SEAL_ROWS", 64)
    if is_large:
        monkeypatch.setattr(index_module, "APPROXIMATE_FROM", 200)
    vectors = np.stack([unit(seed) for seed in range(300)])
    gallery.add([Item(key=f"{n}", camera="gate", time=START) for n in range(300)], vectors)
    gallery.rebuild()

    def found(opened=gallery):
        best = [hits[0].id for hits in opened.search(vectors, 5)]
        passing = opened.search(vectors, 5, Filter(camera="gate", since=START - 1))
        assert [hits[0].id for hits in passing] == best
        return best

    before = found()
    chosen = [f"{n}" for n in range(0, 300, 7)]
    for _ in range(2):
        gallery.bin.add(chosen, "ada", "why")
        assert {*found()} == {before[n] for n in range(300) if n % 7}
        with Gallery.open(gallery.path) as opened:
            gallery.bin.restore([entry.id for entry in gallery.bin.entries()])
            assert found() == found(opened) == before
    gallery.rebuild()
    with Gallery.open(gallery.path) as opened:
        assert found(opened) == before
    assert_sound(gallery)
    assert not [line for line in caplog.messages if "not of this database" in line]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ("vector = zeroblob(16)", "vector of length 0.0"),
        ("camera = 'yard'", "its metadata was altered"),
        ("user = user", "is missing"),
    ],
)
def test_a_gallery_is_verified_with_its_bin(gallery, change, wrong):
    add(gallery, "gate/anna/100", "gate/ben/200")
    gallery.bin.add(["gate/anna/100"], "ada", "why")
    assert gallery.verify() == []
    with sqlite3.connect(gallery.path / "gallery.sqlite") as connection:
        connection.execute(f"UPDATE bin SET {change}")
    connection.close()
    if wrong == "is missing":
        for crop in gallery.bin.crops_dir.glob("gate/**/*.jpg"):
            crop.unlink()
    (problem,) = gallery.verify()
    assert problem.startswith("bin: item gate/anna/100: ")
    assert wrong in problem
    if "vector" in change:
        (entry,) = gallery.bin.entries()
        with refused("vector_altered", IntegrityError):
            gallery.bin.restore([entry.id])
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
for name in ("rename", "unlink"):
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
def test_a_kill_loses_nothing_and_shows_nothing_twice(tmp_path, what):
    whole = tmp_path / "whole"
    with Gallery.open(whole, "toy", DIM, create=True) as gallery:
        add(gallery, "gate/anna/100", "gate/anna/120", "gate/ben/110", "hall/eve/100")
        all_in = rows(gallery)
        if what != "add":
            gallery.bin.add(["gate/anna/100", "gate/anna/120"], "ada", "why")
    command = [sys.executable, "-c", KILLED, str(whole), what]
    subprocess.run(command, env=environment(), check=True)
    outcomes = [_after_a_kill(folder, all_in, what) for folder in tmp_path.glob("whole-*")]
    assert 10 < len(outcomes) < 100
    assert {*outcomes} == ({(4, 0), (2, 2)} if what != "delete" else {(2, 2), (2, 0)})


def _after_a_kill(folder, all_in, what):
    """The pictures in the gallery and in the bin; all files are where they belong."""
    with Gallery.open(folder) as gallery:
        gallery.bin.tidy()
        state = gallery.count(), len(gallery.bin.entries())
        assert gallery.verify() == []
        if state == (2, 0):
            gallery.finish_erasures()
            assert {line["count"] for line in erasures(gallery)} == {2}
        anna = {name.partition("/")[0] for name in files(folder) if "anna" in name}
        assert anna == ({"bin"} if state[1] else set() if what == "delete" else {"crops", "clips"})
        gallery.bin.restore([entry.id for entry in gallery.bin.entries()])
        if state != (2, 0):
            assert rows(gallery)[0] == all_in[0]
            assert what == "delete" or rows(gallery)[1] == all_in[1]
    return state

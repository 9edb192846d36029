"""What a gallery survives: kills, full disks, locks, folders that cannot be written to."""

import errno
import itertools
import os
import shutil
import signal
import sqlite3
import tempfile
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.gallery_places import DIM, items_of, open_new, put, save, some_vectors
from tests.helpers.refused import refused
from upperson_maintenance.export import export_gallery
from upperson_rt.errors import InputError
from upperson_rt.gallery import Filter, Gallery, Item
from upperson_rt.gallery.sqlite import access

KILLS = int(os.environ.get("UPPERSON_TEST_KILLS", "4"))
"""More make a longer test, which prints what it counted:
UPPERSON_TEST_KILLS=100 pytest -s -k writer_is_killed."""


WRITER = """
gallery = open_new(folder)
number = int(sys.argv[2])
while True:
    keys = [f"{number}-{i}" for i in range(number % 37 + 1)]
    columns = {"camera": lambda key: "c" + key.partition("-")[2], "attributes": {"n": number}}
    put(gallery, keys, number, "int8", time=float(number), **columns)
    if number % 5 == 4:
        gallery.delete([f"{number - 1}-0"])
        put(gallery, [f"{number - 2}-0"], -number + 10**6, camera="again")
    if number % 20 == 10:
        gallery.search(some_vectors(1), 1)
    print(number, flush=True)
    number += 1
"""


def expected_rows(acknowledged):
    """Keys and (camera, vector) after these numbers were acknowledged."""
    rows = {}
    for number in range(acknowledged + 1):
        for i, vector in enumerate(some_vectors(number % 37 + 1, number)):
            rows[f"{number}-{i}"] = (f"c{i}", vector)
        if number % 5 == 4:
            del rows[f"{number - 1}-0"]
            rows[f"{number - 2}-0"] = ("again", some_vectors(1, -number + 10**6)[0])
    return rows


def stored_rows(gallery):
    return {
        item.key: (item.camera, row)
        for found, rows in gallery.vectors()
        for item, row in zip(found, rows, strict=True)
    }


@pytest.mark.timeout(max(30, 8 * KILLS))
def test_nothing_acknowledged_is_lost_when_the_writer_is_killed(tmp_path, start):
    rng = np.random.default_rng()
    first, counted = 0, Counter()
    for _ in range(KILLS):
        writer = start(WRITER, tmp_path / "gallery", first)
        lines = [*itertools.islice(writer.stdout, int(rng.integers(1, 40)))]
        writer.send_signal(signal.SIGKILL)
        lines += writer.stdout.readlines()
        assert writer.wait() == -signal.SIGKILL, writer.stderr.read()
        acknowledged = int([line for line in lines if line.endswith("\n")][-1])
        assert acknowledged >= first
        with open_new(tmp_path / "gallery", create=False) as gallery:
            assert gallery.verify() == []
            expected, stored = expected_rows(acknowledged), stored_rows(gallery)
            new = {key for key in stored if key.startswith(f"{acknowledged + 1}-")}
            half_done = new | {f"{acknowledged}-0", f"{acknowledged - 1}-0"}
            certain = expected.keys() - half_done
            lost = certain - stored.keys()
            assert not lost, f"{len(lost)} acknowledged rows are lost"
            assert stored.keys() - half_done == certain
            for key in certain:
                camera, vector = expected[key]
                assert stored[key][0] == camera
                assert np.array_equal(stored[key][1], vector.astype(np.float16))
            # The commit that was under way is there completely or not at all.
            assert len(new) in (0, (acknowledged + 1) % 37 + 1)
            found = gallery.search(some_vectors(3), 10**6)
            assert all(len(hits) == len(stored) for hits in found)
            gallery.delete([key for key in stored if key not in expected])
            for key in half_done & expected.keys():
                camera, vector = expected[key]
                gallery.add([Item(key=key, camera=camera)], vector[None])
        counted += Counter(batches=acknowledged + 1 - first, rows=len(certain), late=len(new) > 0)
        first = acknowledged + 1
    print(
        f"{KILLS} kills, {counted['batches']} batches acknowledged, {counted['rows']} rows "
        "compared after the kills: none lost, none half; "
        f"{counted['late']} batches were durable, but not acknowledged yet"
    )


MANY = items_of(range(3000), camera=lambda n: f"c{n % 3}", time=float)
COMMANDS = {
    "export": (3000, export_gallery),
    "rebuild": (3000, lambda gallery, _: gallery.rebuild()),
    "prune": (1000, lambda gallery, _: gallery.prune(older_than=1500.0, keep_newest=1000)),
    "delete": (2000, lambda gallery, _: gallery.delete_where(Filter(camera="c1"))),
    "replace": (3000, lambda gallery, _: put(gallery, range(2000), 5, camera="new", time=float)),
}
"""How many pictures each leaves, and what it does."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "gallery"
    with open_new(folder) as gallery:
        gallery.add(MANY, some_vectors(3000, 9))
        gallery.crops_dir.mkdir()
    return folder


def finishes(folder, place, command, after_s=None):
    """Run a command in a forked process; say whether it finished before it was killed."""
    child = os.fork()
    if not child:
        code = 1
        try:
            COMMANDS[command][1](open_new(folder, create=False), place)
            code = 0
        finally:
            os._exit(code)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in ((0,) if after_s is None else (0, signal.SIGKILL))
    return status == 0


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.timeout(max(60, 10 * KILLS))
def test_a_killed_command_did_all_or_nothing(tmp_path, sound, command):
    rng = np.random.default_rng()
    folder, place, left = tmp_path / "gallery", tmp_path / "exported", COMMANDS[command][0]
    took, done = None, 0
    for _ in range(KILLS):
        shutil.copytree(sound, folder)
        began = time.perf_counter()
        finished = finishes(folder, place, command, took and rng.uniform(0, took))
        took = took or time.perf_counter() - began
        done += finished
        with open_new(folder, create=False) as gallery:
            assert gallery.verify() == []
            count, changed = gallery.count(), gallery.count(Filter(camera="new"))
            assert len(gallery.search(some_vectors(1), 10**6)[0]) == count
            assert count in ((left,) if finished else (3000, left))
            assert changed in ((2000,) if finished and command == "replace" else (0, 2000))
            if command == "export":
                assert finished <= place.exists()
                if place.exists():
                    assert np.load(place / "vectors.npy").shape == (3000, DIM)
                export_gallery(gallery, place)
                assert sorted(os.listdir(tmp_path)) == ["exported", "gallery"]
                shutil.rmtree(place)
        shutil.rmtree(folder)
    print(f"{command}: {KILLS - done} kills, {done} had finished: each did all or nothing")


def test_a_disk_that_turns_read_only_acknowledges_nothing(gallery, monkeypatch):
    """Linux may say of files that they were synced then, though the last change is lost."""
    put(gallery, ["a"], crop="a.jpg")
    save(gallery.crops_dir, "a.jpg")
    opened = os.open

    def turned(path, flags, *mode):
        if os.fspath(path).endswith("-mark"):
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", turned)
    for change in (lambda: put(gallery, ["b"]), lambda: gallery.delete(["a"])):
        with refused("disk_read_only", InputError, path=gallery.path):
            change()
    assert (gallery.crops_dir / "a.jpg").exists()
    assert gallery.count() == 1


FULL = """
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
with Gallery.open(folder) as gallery:
    assert len(gallery.search(some_vectors(1), 999)[0]) == 300
    assert gallery.verify() == []
    try:
        put(gallery, ["new"])
    except InputError:
        pass
    else:
        raise AssertionError("a full disk took a picture")
with Gallery.open(folder) as gallery:
    assert gallery.count() == 300
limits = range(0, 150_000, 4096)
made = 0
for limit in limits:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    place = folder.parent / "a" / "b"
    try:
        open_new(place).close()
    except InputError:
        assert not place.parent.exists(), limit
    else:
        made += 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        with Gallery.open(place) as gallery:
            assert gallery.verify() == []
        shutil.rmtree(place.parent)
assert 0 < made < len(limits)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
gallery, number = Gallery.open(folder), 0
try:
    while True:
        put(gallery, [f"{number}-{i}" for i in range(20)], number)
        number += 1
except InputError as error:
    assert error.code.startswith("disk_"), error.code
assert gallery.count() == len(gallery.search(some_vectors(1), 10**6)[0]) == 300 + 20 * number
print(number)
"""


def test_a_full_disk_can_be_read_loses_nothing_and_keeps_no_half_made_gallery(closed, start):
    """No file may grow beyond a limit, as when a disk is full."""
    out, err = start(FULL, closed).communicate()
    assert out, err
    assert int(out) > 3
    with Gallery.open(closed) as gallery:
        assert gallery.verify() == []
        put(gallery, ["goes on"])
        assert gallery.count() == 300 + 20 * int(out) + 1


def test_a_lock_ends_with_advice(gallery, monkeypatch):
    monkeypatch.setattr(access, "LOCK_TIMEOUT_S", 0.05)
    put(gallery, ["a"])
    with closing(sqlite3.connect(gallery.path / "gallery.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for change in (
            lambda: put(gallery, ["b"]),
            lambda: gallery.delete(["a"]),
            lambda: gallery.prune(keep_newest=0),
        ):
            with refused("gallery_locked", InputError):
                change()
        assert len(gallery.search(some_vectors(1), 9)[0]) == 1  # Reading goes on.
    put(gallery, ["b"])
    assert gallery.count() == 2


@pytest.fixture
def public_folder():
    """A gallery of 40 pictures that other users reach; pytest's own folders are private."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "gallery")
        with open_new(folder) as gallery:
            put(gallery, range(40), 99)
        for path in (Path(parent), folder):
            path.chmod(0o755)
        yield folder
        folder.chmod(0o755)


UNPRIVILEGED = """
with open_new(folder, create=False) as gallery:  # Imports everything: only root may.
    gallery.search(some_vectors(1), 1)
    gallery.verify()
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
else:
    from upperson_rt.gallery.sqlite import database
    database._is_writable = lambda path: False
gallery = open_new(folder, create=False)
assert gallery._database.read_only
"""
CHANGES = """
assert len(gallery.search(some_vectors(1), 99)[0]) == 40
assert gallery.verify() == [], gallery.verify()
for change in (lambda: put(gallery, ["new"]), lambda: gallery.delete(["k1"])):
    try:
        change()
    except InputError as error:
        print(error.code)
assert gallery.count() == 40
"""


def test_a_folder_that_cannot_be_written_to_can_be_searched(start, public_folder):
    (public_folder / "gallery.sqlite").chmod(0o444)
    public_folder.chmod(0o555)
    process = start(UNPRIVILEGED + CHANGES, public_folder)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.splitlines() == ["gallery_read_only"] * 2
    assert os.listdir(public_folder) == ["gallery.sqlite"]


UNPRIVILEGED_READER = """
for line in sys.stdin:
    if line.startswith("begin"):
        batches = gallery.vectors(batch_size=10)
        print(len(next(batches)[0]), flush=True)
    elif line.startswith("end"):
        try:
            print(sum(len(items) for items, _ in batches), flush=True)
        except InputError as error:
            print(error, flush=True)
    else:
        number = int(line)
        hits = gallery.search(some_vectors(1, number), 1)[0]
        found = len(gallery.search(some_vectors(1), 99)[0])
        print(hits[0].item.key, gallery.count(), found, flush=True)
"""


def test_a_reader_that_may_not_write_sees_every_commit(start, public_folder):
    """Whether a writer is there or not: without one, it reads without locks."""
    reader = start(UNPRIVILEGED + UNPRIVILEGED_READER, public_folder)

    def ask(line):
        reader.stdin.write(f"{line}\n")
        reader.stdin.flush()
        answer = reader.stdout.readline()
        assert answer, reader.stderr.read()
        return answer.strip()

    assert ask(0).endswith("40 40")
    for number in range(1, 4):
        with open_new(public_folder) as writer:
            for part in range(2):
                key = 10 * number + part
                put(writer, [f"n{key}"], key)
                count = 40 + 2 * number - 1 + part
                assert ask(key) == f"n{key} {count} {count}"
        assert ask(10 * number) == f"n{10 * number} {count} {count}"
    reader.communicate()
    assert reader.returncode == 0
    # A new one, since the former kept the log from being removed.
    with open_new(public_folder) as writer:
        put(writer, ["last"])
    assert not (public_folder / "gallery.sqlite-wal").exists()
    reader = start(UNPRIVILEGED + UNPRIVILEGED_READER, public_folder)
    assert ask("begin") == "10"
    with open_new(public_folder) as writer:
        put(writer, [f"m{i}" for i in range(200)], 5)
    assert ask("end") == "37"  # Of the state in which it began.
    assert ask(0).endswith("247 99")
    reader.communicate()
    assert reader.returncode == 0

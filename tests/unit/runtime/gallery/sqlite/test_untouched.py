"""What is read or refused stays as it is: contents, names and times of a gallery's files."""

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from threading import Thread

import numpy as np
import pytest

from tests.helpers.command_line import environment
from tests.helpers.gallery_places import open_new, put, some_vectors, sql
from tests.helpers.gallery_untouched import look_of
from tests.helpers.refused import refused
from tests.unit.runtime.gallery.sqlite.conftest import put_of_cameras
from tests.unit.runtime.gallery.sqlite.test_damage import pages
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.gallery import Gallery
from upperson_rt.gallery.sqlite import database, index
from upperson_rt.gallery.sqlite.access import (
    Beside,
    connect_locked,
    folder_lock,
    log_of,
    read_log,
)
from upperson_rt.gallery.sqlite.schema import PAGE_BYTES


@pytest.mark.timeout(180)
def test_no_refusal_changes_a_file(in_memory):
    """Logs of others, older and newer ones, damage of each kind; reading, and what would write."""
    command = [sys.executable, "-m", "tests.helpers.gallery_untouched", "--trials=13"]
    done = subprocess.run(
        [*command, "--uses=2", "--rows=250"],
        env={**environment(), "TMPDIR": str(in_memory)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("place", ["closed", "killed"])
def test_reading_changes_no_file(place, request):
    folder = request.getfixturevalue(place)
    before = look_of(folder)
    with open_new(folder, create=False) as gallery:
        count = gallery.count()
        assert len(gallery.search(some_vectors(1), 10**6)[0]) == count
        assert gallery.verify() == []
        gallery.info()
    assert look_of(folder) == before


def test_damage_that_a_later_change_meets_keeps_the_log(closed):
    sql(closed, "UPDATE items SET source = 'other' WHERE key = 'k1'")
    with Gallery.open(closed) as gallery:
        put(gallery, [1000])
        with pytest.raises(IntegrityError):
            gallery.delete(["k1"])
        assert gallery.count() == 301
    assert (closed / "gallery.sqlite-wal").stat().st_size > 0
    with Gallery.open(closed) as gallery:
        assert gallery.count() == 301


def test_free_pages_of_another_program_are_no_damage(closed):
    with closing(sqlite3.connect(closed / "gallery.sqlite")) as other:
        other.execute("CREATE TABLE large AS SELECT hex(zeroblob(90000)) AS x")
        other.execute("DROP TABLE large")
        other.commit()
    with Gallery.open(closed) as gallery:
        put(gallery, range(1000, 1100))
        assert gallery.verify() == []


def test_a_refused_search_leaves_the_file_of_the_index(closed, monkeypatch):
    monkeypatch.setattr(index, "_SEAL_ROWS", 64)
    sql(closed, "UPDATE items SET source = 'other' WHERE key = 'k1'")
    before = look_of(closed)
    with pytest.raises(IntegrityError), Gallery.open(closed) as gallery:
        gallery.search(some_vectors(1), 300)
    assert look_of(closed) == before


def test_pages_in_each_others_place_give_no_sample(closed):
    path = closed / "gallery.sqlite"
    mixed = pages(path)
    leaves = [n for n, page in enumerate(mixed) if page[0] == 13 and b"c1" in page]
    first, second = leaves[1], leaves[-2]
    mixed[first], mixed[second] = mixed[second], mixed[first]
    path.write_bytes(b"".join(mixed))
    with Gallery.open(closed) as gallery:
        for use in (lambda: gallery.sample(40), lambda: gallery.get(range(1, 300))):
            with pytest.raises(IntegrityError):
                use()


# Beside others


def test_a_long_reading_sees_one_state_while_others_write_and_close(closed, monkeypatch):
    monkeypatch.setattr(database, "_CHECKPOINT_BYTES", PAGE_BYTES)
    with Gallery.open(closed) as reader:
        batches, walk = reader.vectors(batch_size=10), reader.items()
        _, stored = next(batches)
        assert np.array_equal(stored, some_vectors(300)[:10].astype(np.float16))
        assert next(walk).key == "k0"
        for number in range(3):
            with Gallery.open(closed) as writer:
                put_of_cameras(writer, 50, 1000 * (number + 1), number)
                writer.delete([f"k{number}", f"k{200 + number}"])
        rest = [item.key for found, _ in batches for item in found]
        assert rest == [f"k{n}" for n in range(10, 300)]
        assert [item.key for item in walk] == [f"k{n}" for n in range(1, 300)]
        assert reader.count() == 300 + 150 - 6
    with Gallery.open(closed) as gallery:
        put(gallery, [9000])
    assert sorted(path.name for path in closed.glob("gallery*")) == ["gallery.sqlite"]
    with Gallery.open(closed) as gallery:
        assert gallery.count() == 445
        assert gallery.verify() == []
        batches = gallery.vectors(batch_size=10)
        next(batches)
        with open(closed / "gallery.sqlite", "ab") as file:  # A program that knows no locks.
            file.write(b"x")
        with pytest.raises(InputError):
            list(batches)


def test_a_log_is_read_as_sqlite_reads_it(killed, tmp_path):
    content = (killed / "gallery.sqlite-wal").read_bytes()

    def flipped(at, bits):
        return content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :]

    some = np.random.default_rng(5).integers(0, len(content), 12).tolist()
    for number, log in enumerate(
        [
            content, b"", content[:31], content[:32], content + bytes(5000),
            *(content[:at] for at in some), *(flipped(at, 1) for at in some),
            *(flipped(at, 255) for at in (0, 3, 8, 17, 27, 40, 47)),
        ]
    ):  # fmt: skip
        folder = tmp_path / f"copy{number}"
        folder.mkdir()
        shutil.copy(killed / "gallery.sqlite", folder)
        (folder / "gallery.sqlite-wal").write_bytes(log)
        found = read_log(folder / "gallery.sqlite-wal")
        with closing(sqlite3.connect(folder / "gallery.sqlite")) as connection:
            _, frames, _ = connection.execute("PRAGMA wal_checkpoint").fetchone()
        place = 0 if found is None else max(found.last.values()) + PAGE_BYTES
        assert place == (32 + frames * (24 + PAGE_BYTES) if frames > 0 else 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_process_that_began_on_the_log_of_a_killed_one_keeps_its_locks(killed, start):
    """Its first reading has no locks; where that ends, those of its later ones must stay."""
    time.sleep(0.15)  # A reading without locks is used again once its files have settled.
    with Gallery.open(killed) as gallery:
        gallery.count()
        put(gallery, [1000])
        gallery.count()
        code = "with Gallery.open(folder) as gallery: gallery.delete(['1-1'])"
        assert start(code, killed).wait() == 0
        put(gallery, [2000])
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        assert (killed / "gallery.sqlite-wal").exists()
    with Gallery.open(killed) as gallery:
        assert set(gallery.ids(["k1000", "k2000", "1-1"])) == {"k1000", "k2000"}


def test_a_checkpoint_that_was_cut_short_is_read_on(killed):
    log = read_log(killed / "gallery.sqlite-wal")
    assert log is not None
    with open(killed / "gallery.sqlite", "r+b") as file:
        for number, place in sorted(log.last.items())[:3]:
            file.seek((number - 1) * log.page_size)
            file.write(log.page(place))
    with Gallery.open(killed) as gallery:
        assert gallery.verify() == []
        put(gallery, [1000])
        assert gallery.count() == 121


def test_a_link_to_the_file_is_that_file_to_readers(killed, tmp_path):
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "gallery.sqlite").symlink_to(killed / "gallery.sqlite")
    with Gallery.open(folder) as linked:
        assert linked.count() == 120  # The log lies beside the file.
    with Gallery.open(killed) as gallery, Gallery.open(folder) as linked:
        put(gallery, [1000])
        assert linked.count() == gallery.count() == 121
        with refused("link_in_folder", InputError, path=str(folder / "gallery.sqlite")):
            put(linked, [2000])
        assert gallery.count() == 121
    assert [one.name for one in folder.iterdir()] == ["gallery.sqlite"]


def test_a_file_without_a_page_keeps_its_log(killed):
    """SQLite would remove it."""
    for size in (511, 1, 0):
        os.truncate(killed / "gallery.sqlite", size)
        before = look_of(killed)
        for create in (False, True):
            with refused("gallery_file_empty", IntegrityError):
                open_new(killed, create=create)
        assert look_of(killed) == before


def test_what_is_no_file_beside_it_is_refused(closed):
    for name in ("-wal", "-shm", "-mark", "-journal"):
        os.mkfifo(closed / f"gallery.sqlite{name}")
        with refused("not_a_file", IntegrityError):
            Gallery.open(closed)
        os.unlink(closed / f"gallery.sqlite{name}")


def test_a_connection_waits_while_files_are_put_back(closed):
    path, connected = closed / "gallery.sqlite", []
    with folder_lock(path):
        thread = Thread(target=lambda: connected.append(connect_locked(path, "rw")))
        thread.start()
        thread.join(0.2)
        assert connected == []
    thread.join()
    connected[0].close()


def test_transactions_of_another_process_are_not_put_back(killed, start):
    path = killed / "gallery.sqlite"
    beside = Beside(path, read_log(log_of(path)))
    assert start("Gallery.open(folder).delete(['1-1']); os._exit(0)", killed).wait() == 0
    with folder_lock(path):
        beside.put_back()
    with Gallery.open(killed) as gallery:
        assert gallery.ids(["1-1"]) == {}
        assert gallery.count() == 119

"""Free pages of a file: they become zeros without SQLite's log, and no other byte changes."""

import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from tests.helpers.gallery_places import open_new, put
from tests.helpers.refused import refused
from upperson_rt.errors import IntegrityError
from upperson_rt.files import bytes_on_disk
from upperson_rt.gallery import Gallery
from upperson_rt.gallery.sqlite import deletion, free_pages
from upperson_rt.gallery.sqlite.free_pages import FreePages
from upperson_rt.gallery.sqlite.schema import DamageError

ROWS = 3000


@pytest.fixture(params=[1024, 4096])
def file(request, tmp_path):
    """A database of which half of the rows were deleted without being overwritten."""
    path = tmp_path / "some.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA page_size = {request.param}")
        connection.execute("CREATE TABLE items (id INTEGER PRIMARY KEY, content BLOB)")
        rows = ((row, b"%08d" % row * 200) for row in range(ROWS))
        connection.executemany("INSERT INTO items VALUES (?, ?)", rows)
        connection.execute("PRAGMA secure_delete = FAST")
        connection.execute("DELETE FROM items WHERE id BETWEEN 100 AND 1500 OR id % 9 = 0")
        connection.commit()
    return path


def kept(path):
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return connection.execute("SELECT * FROM items ORDER BY id").fetchall()


@pytest.fixture(params=["holes", "zeros"])
def way(request, monkeypatch):
    if request.param == "zeros":  # A file system that has no holes.
        monkeypatch.setattr(free_pages, "_punch", lambda *_: False)
    return request.param


@pytest.fixture
def handle(file):
    opened = os.open(file, os.O_RDWR)
    yield opened
    os.close(opened)


def test_free_pages_become_zeros_and_nothing_else_changes(file, handle, way):
    before, taken = kept(file), bytes_on_disk(file.stat())
    free = FreePages.read(handle)
    with closing(sqlite3.connect(file)) as connection:
        (count,) = connection.execute("PRAGMA freelist_count").fetchone()
    assert len(free.leaves) + len(free.trunks) == count > 300
    assert free.count_used(handle) > 300
    after, steps = 0, 0
    while after is not None:
        after, steps = free.overwrite(handle, after, 0.0), steps + 1
    assert steps > 2  # Time ended after each.
    assert free.count_used(handle) == 0
    assert kept(file) == before
    assert b"00001234" not in file.read_bytes()
    if way == "zeros":
        assert bytes_on_disk(file.stat()) == taken


def test_what_is_zero_is_not_written_again(handle, monkeypatch):
    monkeypatch.setattr(free_pages, "_punch", lambda *_: False)
    FreePages.read(handle).overwrite(handle, 0, 60.0)
    monkeypatch.setattr(free_pages.os, "write", lambda *_: pytest.fail("written"))
    FreePages.read(handle).overwrite(handle, 0, 60.0)


def test_an_altered_list_is_refused(file, handle):
    sound = file.read_bytes()
    page_bytes, first = (int.from_bytes(sound[at : at + n], "big") for at, n in ((16, 2), (32, 4)))
    start = (first - 1) * page_bytes
    for place in (32, 36, start, start + 4, start + 8):  # First, number, next, count, leaf.
        for content in (b"\0\0\0\1", b"\xff\xff\xff\xff"):
            file.write_bytes(sound[:place] + content + sound[place + 4 :])
            with refused("free_pages_altered", DamageError):
                FreePages.read(handle)


@pytest.fixture
def gallery(tmp_path, monkeypatch):
    monkeypatch.setattr(deletion, "PAUSE_S", 0.0)
    with open_new(tmp_path / "gallery") as opened:
        put(opened, range(ROWS), source=f"source-{{:06d}}-{300 * 'x'}".format, time=float)
        yield opened


def left(gallery):
    """Return how many of the oldest rows can be read in the files."""
    content = b"".join(file.read_bytes() for file in gallery.path.glob("gallery.sqlite*"))
    return len(set(re.findall(rb"source-0000\d\d-xxx", content)))


def test_pruning_gives_space_back_without_moving_rows(gallery):
    gallery.finish_erasures()
    file = gallery.path / "gallery.sqlite"
    before, taken = file.stat().st_size, bytes_on_disk(file.stat())
    assert left(gallery) == 100
    assert gallery.prune(keep_newest=ROWS // 2) == ROWS // 2
    assert left(gallery) == 0
    assert file.stat().st_size == before  # For new rows.
    assert gallery.reusable_bytes() < 0.2 * taken
    assert gallery.verify() == []


def test_pages_that_a_reader_needs_are_overwritten_by_the_next_deletion(gallery, monkeypatch):
    monkeypatch.setattr(deletion, "_TRIES", 1)
    with gallery.database.reading() as transaction:
        assert transaction.count() == ROWS
        assert gallery.prune(older_than=100) == 100
        assert transaction.execute("SELECT count(*) FROM items").fetchone() == (ROWS,)
        assert gallery.delete(["nothing"]) == 0  # Nor is it possible now.
    assert left(gallery) > 50
    assert gallery.delete(["nothing"]) == 0
    assert left(gallery) == 0
    assert gallery.verify() == []


def test_a_deletion_of_nothing_spares_the_first_change_no_check(gallery):
    gallery.prune(older_than=100)
    gallery.close()
    file = gallery.path / "gallery.sqlite"
    with Gallery.open(gallery.path) as again:
        assert again.prune(older_than=0) == again.delete(["nothing"]) == 0
        content = bytearray(file.read_bytes())
        content[36:40] = b"\xff\xff\xff\xff"  # The number of free pages.
        file.write_bytes(content)
        for _ in range(2):
            with pytest.raises(IntegrityError):
                put(again, ["new"])
        assert file.read_bytes() == content


def test_what_the_process_has_locked_stays_locked(gallery):
    """Closing any other descriptor of a file ends the locks of the process on it."""
    gallery.prune(older_than=100)
    script = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); "
        "c.execute('PRAGMA locking_mode = EXCLUSIVE'); c.execute('BEGIN EXCLUSIVE')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(gallery.path / "gallery.sqlite")],
        capture_output=True,
        check=False,
    )
    assert b"locked" in done.stderr

"""Files that are not what was written: answers are right, or there are none."""

import os
import shutil
import subprocess
import sys
from contextlib import suppress

import pytest

from tests.helpers.command_line import environment
from tests.helpers.gallery_places import open_new, put, some_vectors, sql
from tests.helpers.gallery_untouched import look_of
from tests.helpers.refused import refused
from upperson_doctor import diagnosis as doctor
from upperson_rt.errors import IntegrityError
from upperson_rt.gallery import Filter, Gallery
from upperson_rt.gallery.sqlite import index
from upperson_rt.gallery.sqlite.schema import PAGE_BYTES

TRIALS = int(os.environ.get("UPPERSON_TEST_DAMAGES", "12"))
"""More make a longer test: UPPERSON_TEST_DAMAGES=1000 pytest -s -k damage_is_believed."""


@pytest.mark.timeout(120 + 6 * TRIALS)
def test_no_damage_is_believed(in_memory):
    """Of any size: in the database, in its log, in the file of the index; in pictures, too."""
    lines = {}
    for name, *options in (
        ("gallery_damage", f"--trials={TRIALS}", "--rows=300", "--index-from=256"),
        ("picture_damage", f"--trials={10 * TRIALS}"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", f"tests.helpers.{name}", *options],
            env={**environment(), "TMPDIR": str(in_memory)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        print(done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        lines[name] = done.stdout.splitlines()
    assert f"'refused': {TRIALS}" not in lines["gallery_damage"][-1]


def contents(folder):
    files = (path for path in folder.iterdir() if not path.name.endswith("-shm"))
    return {path.name: path.read_bytes() for path in files}


LOSSES = {
    "all": None,
    "half": lambda content: content[: len(content) // 2],
    "last page": lambda content: content[:-PAGE_BYTES],
    "bit": lambda content: content[:-5000] + bytes([content[-5000] ^ 1]) + content[-4999:],
}


def assert_not_believed(folder, code, **fields):
    """Twice, and nothing is changed."""
    before = contents(folder)
    for _ in range(2):
        with refused(code, IntegrityError, **fields):
            open_new(folder, create=False)
        assert contents(folder) == before


@pytest.mark.parametrize("loss", LOSSES)
def test_a_log_that_lost_what_was_acknowledged_is_not_believed(killed, loss):
    log = killed / "gallery.sqlite-wal"
    if loss == "all":
        log.unlink()
    else:
        log.write_bytes(LOSSES[loss](log.read_bytes()))
    assert_not_believed(killed, "transactions_lost", acknowledged=6)
    (killed / "gallery.sqlite-mark").unlink()
    if loss == "all":
        return  # The tables stood in it, too.
    with open_new(killed, create=False) as gallery:
        assert gallery.count() in range(20, 120, 20)
        assert gallery.verify() == []


def test_the_log_of_another_gallery_is_not_believed(killed, killed_galleries):
    shutil.copy(killed_galleries / "other" / "gallery.sqlite-wal", killed)
    (killed / "gallery.sqlite-shm").unlink()
    assert_not_believed(killed, "log_of_other_gallery")


@pytest.mark.parametrize("vector", [5, b""])
def test_a_newest_vector_that_is_none_is_damage(closed, vector, monkeypatch):
    monkeypatch.setattr(index, "_SEAL_ROWS", 64)
    with Gallery.open(closed) as gallery:
        gallery.search(some_vectors(1), 1)
    ((trigger,),) = sql(closed, "SELECT sql FROM sqlite_master WHERE name = 'items_replaced'")
    sql(closed, "DROP TRIGGER items_replaced")  # So that the log of changes does not show it.
    sql(closed, "UPDATE items SET vector = ? WHERE key = 'k299'", vector)
    sql(closed, trigger)
    with Gallery.open(closed) as gallery:
        for use in (lambda: gallery.search(some_vectors(1), 1), gallery.rebuild):
            with refused("vector_altered", IntegrityError, id=300):
                use()
        assert any("k299: " in problem for problem in gallery.verify())
        assert gallery.info().items == 300
    assert doctor._gallery(closed, None).exit_code == 6


def pages(path):
    content = path.read_bytes()
    return [content[start : start + PAGE_BYTES] for start in range(0, len(content), PAGE_BYTES)]


COLUMNS = {"camera": lambda n: f"c{n % 3}", "time": float, "track": lambda n: f"t{n % 2}"}
CAMERA = Filter(camera="c1")
USES = {
    "search": lambda gallery: gallery.search(some_vectors(1), 5),
    "camera": lambda gallery: gallery.search(some_vectors(1), 5, CAMERA),
    "time": lambda gallery: gallery.search(some_vectors(1), 5, Filter(since=0)),
    "track": lambda gallery: gallery.search(some_vectors(1), 200, Filter(track="t1")),
    "attributes": lambda gallery: gallery.search(some_vectors(1), 5, Filter(attributes={"n": 1})),
    "items": lambda gallery: list(gallery.items(CAMERA)),
    "vectors": lambda gallery: list(gallery.vectors(CAMERA)),
    "replace": lambda gallery: put(gallery, [250]),
    "delete": lambda gallery: gallery.delete(["k250"]),
    "delete_where": lambda gallery: gallery.delete_where(CAMERA),
    "check": lambda gallery: gallery.check(),
}


@pytest.mark.parametrize("indexed", [False, True])
def test_a_page_of_an_earlier_state_is_not_believed(tmp_path, monkeypatch, indexed):
    """Its rows fit their checksums, and camera, time and track are what they were."""
    if indexed:
        monkeypatch.setattr(index, "_SEAL_ROWS", 64)
    path = tmp_path / "gallery.sqlite"
    columns = {**COLUMNS, "attributes": {"n": 1}}
    with open_new(tmp_path) as gallery:
        put(gallery, range(300), **columns)
    earlier = pages(path)
    with Gallery.open(tmp_path) as gallery:
        put(gallery, range(300), 2, **columns)
        gallery.search(some_vectors(1), 1)
    now = pages(path)
    leaves = [n for n in range(len(earlier)) if earlier[n] != now[n] and b'{"n": 1}' in now[n]]
    assert len(leaves) > 5
    for some in ([leaves[3]], leaves):
        path.write_bytes(b"".join(earlier[n] if n in some else page for n, page in enumerate(now)))
        damaged = contents(tmp_path)
        believed = set()
        for name, use in USES.items():
            with Gallery.open(tmp_path) as gallery, suppress(IntegrityError):
                use(gallery)
                believed.add(name)
        assert contents(tmp_path) == damaged
        assert believed <= ({"search"} if indexed and len(some) == 1 else set())  # Not of the page.
        with Gallery.open(tmp_path) as gallery:
            if indexed:
                with pytest.raises(IntegrityError):
                    gallery.search(some_vectors(1), 300)
            assert any("300 pictures were stored" in problem for problem in gallery.verify())


DELETED, ADDED = ("key", "camera_time", "track", "crop"), ("key", "time", "variant")
PAGES = [*((column, "delete") for column in DELETED), *((column, "add") for column in ADDED)]


@pytest.mark.parametrize(("column", "change"), PAGES)
def test_an_earlier_page_of_an_index_is_not_believed(tmp_path, column, change):
    """SQLite's integrity check takes more entries of a partial index than there are rows."""
    path = tmp_path / "gallery.sqlite"
    with open_new(tmp_path) as gallery:
        put(gallery, range(20), variant="int8", **COLUMNS, crop="{}.jpg".format)
    earlier = pages(path)
    with Gallery.open(tmp_path) as gallery:
        if change == "delete":
            gallery.delete(["k7"])
        else:
            more = {"camera": "c0", "time": 0.0, "track": "t0", "crop": "new.jpg"}
            put(gallery, ["new"], variant="int8", **more)
    name = "sqlite_autoindex_items_1" if column == "key" else f"items_by_{column}"
    ((page,),) = sql(tmp_path, "SELECT rootpage FROM sqlite_master WHERE name = ?", name)
    now = pages(path)
    path.write_bytes(b"".join([*now[: page - 1], earlier[page - 1], *now[page:]]))
    for use in ("info", "check", "cameras"):
        with pytest.raises(IntegrityError), Gallery.open(tmp_path) as gallery:
            getattr(gallery, use)()
    with Gallery.open(tmp_path) as gallery:
        assert any(name in problem for problem in gallery.verify())


@pytest.mark.parametrize("column", ["camera", "attributes", "source"])
def test_an_altered_row_is_not_replaced(closed, column):
    """The new item would take over its camera, and the sums would lose what shows it."""
    sql(closed, f"UPDATE items SET {column} = 'hall' WHERE key = 'k1'")
    before = look_of(closed)
    with Gallery.open(closed) as gallery, refused("row_altered", IntegrityError, id=2):
        put(gallery, ["new", 1], 1)
    assert look_of(closed) == before
    with Gallery.open(closed) as gallery:
        assert gallery.count() == 300
        assert any("k1: " in problem for problem in gallery.verify())
        put(gallery, [0], 2)  # Others are.


@pytest.mark.parametrize("end", [b"\x9d", b"\n"])
def test_a_definition_that_cannot_be_read_is_damage_in_one_line(closed, end):
    file = closed / "gallery.sqlite"
    file.write_bytes(file.read_bytes().replace(b"items_adding BEFORE", b"items_adding B" + end * 5))
    with refused("gallery_damaged", IntegrityError) as error:
        Gallery.open(closed)
    assert "\n" not in str(error.value)


def test_a_log_of_changes_that_was_altered_takes_no_more(closed):
    sql(closed, "INSERT OR REPLACE INTO sqlite_sequence (name, seq) VALUES ('changes', 7)")
    for change in (
        lambda gallery: put(gallery, ["new"]),
        lambda gallery: put(gallery, ["k1"]),
        lambda gallery: gallery.delete(["k1"]),
    ):
        with Gallery.open(closed) as gallery:
            with refused("changes_altered", IntegrityError):
                change(gallery)
            assert len(gallery.verify()) == 1
            assert gallery.count() == 300


@pytest.mark.parametrize("mark", [None, b"", b"gallery 9\n", b"\xff" * 62], ids=str)
def test_a_log_is_believed_without_a_mark(killed, mark):
    path = killed / "gallery.sqlite-mark"
    path.unlink()
    if mark is not None:
        path.write_bytes(mark)
    with open_new(killed, create=False) as gallery:
        assert gallery.count() == 120
        put(gallery, ["more"])
        assert path.exists()
    assert not path.exists()
    assert not (killed / "gallery.sqlite-wal").exists()


def test_the_mark_of_another_or_a_later_state_says_nothing_without_a_log(killed, closed):
    file = closed / "gallery.sqlite"
    copy = file.read_bytes()
    shutil.copy(killed / "gallery.sqlite-mark", closed)
    with Gallery.open(closed) as gallery, Gallery.open(closed) as other:
        put(gallery, ["b"], 2)
        with Gallery.open(closed) as third:
            assert other.count() == third.count() == 301
    file.write_bytes(copy)  # It is put back after closing.
    with Gallery.open(closed) as gallery:
        assert gallery.count() == 300
        assert gallery.ids(["b"]) == {}

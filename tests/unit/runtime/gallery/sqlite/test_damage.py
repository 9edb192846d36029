"""Files that are not what was written: answers are right, or there are none."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.helpers.command_line import environment
from tests.helpers.gallery_places import DIM, FINGERPRINT, some_vectors, sql
from tests.helpers.refused import refused
from upperson_doctor import diagnosis as doctor
from upperson_rt.errors import IntegrityError
from upperson_rt.gallery import Filter, Gallery, Item
from upperson_rt.gallery.sqlite import index

TRIALS = int(os.environ.get("UPPERSON_TEST_DAMAGES", "24"))
"""More make a longer test: UPPERSON_TEST_DAMAGES=1000 pytest -s -k damage_is_believed."""


@pytest.mark.timeout(60 + 3 * TRIALS)
def test_no_damage_is_believed():
    """Of any size: in the database, in its log, in the file of the index."""
    command = [sys.executable, "-m", "tests.helpers.gallery_damage", f"--trials={TRIALS}"]
    done = subprocess.run(
        [*command, "--rows=300", "--index-from=256"],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"'refused': {TRIALS}" not in done.stdout.splitlines()[-1]


def contents(folder):
    files = (path for path in folder.iterdir() if not path.name.endswith("-shm"))
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.parametrize("loss", ["all", "half", "last page", "bit"])
def test_a_log_that_lost_what_was_acknowledged_is_not_believed(killed, loss):
    log = killed / "gallery.sqlite-wal"
    content = bytearray(log.read_bytes())
    if loss == "all":
        log.unlink()
    elif loss == "half":
        log.write_bytes(content[: len(content) // 2])
    elif loss == "last page":
        log.write_bytes(content[:-4096])
    else:
        content[-5000] ^= 1
        log.write_bytes(content)
    before = contents(killed)
    for _ in range(2):
        with refused("transactions_lost", IntegrityError, acknowledged=6):
            Gallery.open(killed, FINGERPRINT, DIM)
        assert contents(killed) == before
    (killed / "gallery.sqlite-mark").unlink()
    if loss == "all":
        return  # The tables stood in it, too.
    with Gallery.open(killed, FINGERPRINT, DIM) as gallery:
        assert gallery.count() in range(20, 120, 20)
        assert gallery.verify() == []


def test_the_log_of_another_gallery_is_not_believed(killed, other_killed):
    shutil.copy(other_killed / "gallery.sqlite-wal", killed)
    (killed / "gallery.sqlite-shm").unlink()
    before = contents(killed)
    for _ in range(2):
        with refused("log_of_other_gallery", IntegrityError):
            Gallery.open(killed, FINGERPRINT, DIM)
        assert contents(killed) == before


def test_the_mark_of_another_gallery_says_nothing_without_a_log(killed, tmp_path):
    folder = tmp_path / "closed"
    with Gallery.open(folder, FINGERPRINT, DIM, create=True) as gallery:
        gallery.add([Item(key="a")], some_vectors(1))
    shutil.copy(killed / "gallery.sqlite-mark", folder)
    with Gallery.open(folder) as gallery, Gallery.open(folder) as other:
        gallery.add([Item(key="b")], some_vectors(1, 2))
        with Gallery.open(folder) as third:
            assert other.count() == third.count() == 2


def test_altered_dimensions_are_damage(tmp_path):
    Gallery.open(tmp_path / "g", FINGERPRINT, DIM, create=True).close()
    sql(tmp_path / "g", "UPDATE meta SET value = '32' WHERE name = 'embed_dim'")
    with refused("meta_altered", IntegrityError):
        Gallery.open(tmp_path / "g")


@pytest.mark.parametrize("vector", [5, "text", b""])
def test_a_newest_vector_that_is_none_is_damage(tmp_path, vector, monkeypatch):
    """The file of the index knows the newest vectors, too."""
    monkeypatch.setattr(index, "_SEAL_ROWS", 64)
    folder = tmp_path / "g"
    with Gallery.open(folder, FINGERPRINT, DIM, create=True) as gallery:
        gallery.add([Item(key=f"k{i}") for i in range(100)], some_vectors(100))
        gallery.search(some_vectors(1), 1)
    ((trigger,),) = sql(folder, "SELECT sql FROM sqlite_master WHERE name = 'items_replaced'")
    sql(folder, "DROP TRIGGER items_replaced")  # So that the log of changes does not tell.
    sql(folder, "UPDATE items SET vector = ? WHERE key = 'k99'", vector)
    sql(folder, trigger)
    with Gallery.open(folder) as gallery:
        for use in (lambda: gallery.search(some_vectors(1), 1), gallery.rebuild):
            with refused("vector_altered", IntegrityError, id=100):
                use()
        assert any("k99: " in problem for problem in gallery.verify())
        assert gallery.info().items == 100
    assert doctor._gallery(folder, None).exit_code == 6


def pages(content):
    return [content[start : start + 4096] for start in range(0, len(content), 4096)]


CAMERA = Filter(camera="c1")
USES = {
    "search": lambda gallery: gallery.search(some_vectors(1), 5),
    "camera": lambda gallery: gallery.search(some_vectors(1), 5, CAMERA),
    "time": lambda gallery: gallery.search(some_vectors(1), 5, Filter(since=0)),
    "track": lambda gallery: gallery.search(some_vectors(1), 200, Filter(track="t1")),
    "attributes": lambda gallery: gallery.search(some_vectors(1), 5, Filter(attributes={"n": 1})),
    "items": lambda gallery: list(gallery.items(CAMERA)),
    "vectors": lambda gallery: list(gallery.vectors(CAMERA)),
    "replace": lambda gallery: gallery.add([Item(key="k250")], some_vectors(1)),
    "delete": lambda gallery: gallery.delete(["k250"]),
    "delete_where": lambda gallery: gallery.delete_where(CAMERA),
    "check": lambda gallery: gallery.check(),
}


@pytest.mark.parametrize("indexed", [False, True])
def test_a_page_of_an_earlier_state_is_not_believed(tmp_path, monkeypatch, indexed):
    """Its rows fit their checksums, and camera, time and track are what they were."""
    if indexed:
        monkeypatch.setattr(index, "_SEAL_ROWS", 64)
    folder = tmp_path / "g"
    path = folder / "gallery.sqlite"
    items = [
        Item(key=f"k{n}", camera=f"c{n % 3}", time=float(n), track=f"t{n % 2}", attributes={"n": 1})
        for n in range(300)
    ]
    with Gallery.open(folder, FINGERPRINT, DIM, create=True) as gallery:
        gallery.add(items, some_vectors(300))
    earlier = pages(path.read_bytes())
    with Gallery.open(folder) as gallery:
        gallery.add(items, some_vectors(300, 2))
        gallery.search(some_vectors(1), 1)
    now = pages(path.read_bytes())
    leaves = [n for n in range(len(earlier)) if earlier[n] != now[n] and b'{"n": 1}' in now[n]]
    assert len(leaves) > 5
    for some in ([leaves[3]], leaves):
        path.write_bytes(b"".join(earlier[n] if n in some else page for n, page in enumerate(now)))
        damaged = contents(folder)
        refused = []
        for name, use in USES.items():
            with Gallery.open(folder) as gallery:
                try:
                    use(gallery)
                except IntegrityError:
                    refused.append(name)
        assert contents(folder) == damaged
        found_none = {"search"} if indexed and len(some) == 1 else set()  # Not of that page.
        assert set(USES) - set(refused) <= found_none
        with Gallery.open(folder) as gallery:
            if indexed:
                with pytest.raises(IntegrityError):
                    gallery.search(some_vectors(1), 300)
            assert any("300 pictures were stored" in problem for problem in gallery.verify())
        assert doctor._gallery(folder, None).exit_code == 6


@pytest.mark.parametrize("column", ["key", "camera_time", "time", "track", "variant", "crop"])
@pytest.mark.parametrize("change", ["delete", "add"])
def test_an_earlier_page_of_an_index_is_not_believed(tmp_path, column, change):
    """SQLite's integrity check takes more entries of a partial index than there are rows."""
    folder = tmp_path / "g"
    path = folder / "gallery.sqlite"
    items = [
        Item(key=f"k{n}", camera=f"c{n % 3}", time=float(n), track=f"t{n % 2}", crop=f"{n}.jpg")
        for n in range(20)
    ]
    with Gallery.open(folder, FINGERPRINT, DIM, create=True) as gallery:
        gallery.add(items, some_vectors(20), "int8")
    earlier = pages(path.read_bytes())
    with Gallery.open(folder) as gallery:
        if change == "delete":
            gallery.delete(["k7"])
        else:
            gallery.add([replace(items[0], key="new", crop="new.jpg")], some_vectors(1), "int8")
    name = "sqlite_autoindex_items_1" if column == "key" else f"items_by_{column}"
    ((page,),) = sql(folder, "SELECT rootpage FROM sqlite_master WHERE name = ?", name)
    now = pages(path.read_bytes())
    path.write_bytes(b"".join([*now[: page - 1], earlier[page - 1], *now[page:]]))
    for use in ("info", "check", "cameras"):
        with pytest.raises(IntegrityError), Gallery.open(folder) as gallery:
            getattr(gallery, use)()
    with Gallery.open(folder) as gallery:
        assert any(name in problem for problem in gallery.verify())


@pytest.mark.parametrize("column", ["camera", "attributes", "source"])
def test_an_altered_row_is_not_replaced(closed, column):
    """The new item would take over its camera, and the sums would lose what tells of it."""
    sql(closed, f"UPDATE items SET {column} = 'hall' WHERE key = 'k1'")
    with Gallery.open(closed) as gallery:
        with refused("row_altered", IntegrityError, id=2):
            gallery.add([Item(key="new"), Item(key="k1")], some_vectors(2, 1))
        assert gallery.count() == 300
        assert any("k1: " in problem for problem in gallery.verify())
        gallery.add([Item(key="k0")], some_vectors(1, 2))  # Others are.


@pytest.mark.parametrize("end", [b"\x9d", b"\n"])
def test_a_definition_that_cannot_be_read_is_damage_in_one_line(closed, end):
    file = closed / "gallery.sqlite"
    file.write_bytes(file.read_bytes().replace(b"items_adding BEFORE", b"items_adding B" + end * 5))
    with refused("gallery_damaged", IntegrityError) as error:
        Gallery.open(closed)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", ["new", "again", "delete"])
def test_a_log_of_changes_that_was_altered_takes_no_more(closed, change):
    sql(closed, "INSERT OR REPLACE INTO sqlite_sequence (name, seq) VALUES ('changes', 7)")
    with Gallery.open(closed) as gallery:
        changes = {
            "new": lambda: gallery.add([Item(key="new")], some_vectors(1)),
            "again": lambda: gallery.add([Item(key="k1")], some_vectors(1)),
            "delete": lambda: gallery.delete(["k1"]),
        }
        with refused("changes_altered", IntegrityError):
            changes[change]()
        assert len(gallery.verify()) == 1
        assert gallery.count() == 300


@pytest.mark.parametrize("mark", [None, b"", b"gallery 9\n", b"\xff" * 62])
def test_a_log_is_believed_without_a_mark(killed, mark):
    path = killed / "gallery.sqlite-mark"
    path.unlink()
    if mark is not None:
        path.write_bytes(mark)
    with Gallery.open(killed, FINGERPRINT, DIM) as gallery:
        assert gallery.count() == 120
        gallery.add([Item(key="more")], some_vectors(1))
        assert path.exists()
    assert not path.exists()
    assert not (killed / "gallery.sqlite-wal").exists()


def test_a_copy_that_is_put_back_after_closing_is_no_loss(tmp_path):
    with Gallery.open(tmp_path / "g", FINGERPRINT, DIM, create=True) as gallery:
        gallery.add([Item(key="a")], some_vectors(1))
    copy = (tmp_path / "g" / "gallery.sqlite").read_bytes()
    with Gallery.open(tmp_path / "g") as gallery:
        gallery.add([Item(key="b")], some_vectors(1, 2))
    (tmp_path / "g" / "gallery.sqlite").write_bytes(copy)
    with Gallery.open(tmp_path / "g") as gallery:
        assert [item.key for item in gallery.items()] == ["a"]

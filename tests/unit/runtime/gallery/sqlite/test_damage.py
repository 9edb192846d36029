"""Files that are not what was written: answers are right, or there are none."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from tests.helpers.command_line import SOURCES
from tests.helpers.gallery_places import DIM, FINGERPRINT, some_vectors, sql
from upperson_rt import doctor
from upperson_rt.errors import IntegrityError
from upperson_rt.gallery import Filter, Gallery, Item
from upperson_rt.gallery.sqlite import index

TRIALS = int(os.environ.get("UPPERSON_TEST_DAMAGES", "24"))
"""More make a longer test: UPPERSON_TEST_DAMAGES=1000 pytest -s -k damage_is_believed."""

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, SOURCES))}


@pytest.mark.timeout(60 + 3 * TRIALS)
def test_no_damage_is_believed():
    """Of any size: in the database, in its log, in the file of the index."""
    command = [sys.executable, "-m", "tests.helpers.gallery_damage", f"--trials={TRIALS}"]
    done = subprocess.run(
        [*command, "--rows=300", "--index-from=256"],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"'refused': {TRIALS}" not in done.stdout.splitlines()[-1]


KILLED = """
import os, sys, signal
from tests.helpers.gallery_places import DIM, FINGERPRINT, some_vectors
from upperson_rt.gallery import Gallery, Item
gallery = Gallery.open(sys.argv[1], FINGERPRINT, DIM, create=True)
for number in range(6):
    gallery.add([Item(key=f"{number}-{i}") for i in range(20)], some_vectors(20, number))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def killed(tmp_path):
    """The folder of a gallery whose process was killed after six additions of 20 pictures."""
    folder = tmp_path / "gallery"
    command = [sys.executable, "-c", KILLED, str(folder)]
    done = subprocess.run(command, env=ENVIRONMENT, check=False)
    assert done.returncode == -signal.SIGKILL
    return folder


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
    advice = r"of 6 acknowledged .* remove gallery.sqlite-mark"
    for _ in range(2):
        with pytest.raises(IntegrityError, match=advice):
            Gallery.open(killed, FINGERPRINT, DIM)
        assert contents(killed) == before
    (killed / "gallery.sqlite-mark").unlink()
    if loss == "all":
        return  # The tables stood in it, too.
    with Gallery.open(killed, FINGERPRINT, DIM) as gallery:
        assert gallery.count() in range(20, 120, 20)
        assert gallery.verify() == []


def test_the_log_of_another_gallery_is_not_believed(killed, tmp_path):
    other = tmp_path / "other"
    command = [sys.executable, "-c", KILLED, str(other)]
    subprocess.run(command, env=ENVIRONMENT, check=False)
    shutil.copy(other / "gallery.sqlite-wal", killed)
    (killed / "gallery.sqlite-shm").unlink()
    before = contents(killed)
    for _ in range(2):
        with pytest.raises(IntegrityError, match="its log is of another gallery"):
            Gallery.open(killed, FINGERPRINT, DIM)
        assert contents(killed) == before
    with Gallery.open(other, FINGERPRINT, DIM) as gallery:
        assert gallery.verify() == []


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
    with pytest.raises(IntegrityError, match=r"the gallery's description .* altered"):
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
            with pytest.raises(IntegrityError, match="picture with id 100 was altered"):
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
                with pytest.raises(IntegrityError, match=r"of an earlier state|are missing"):
                    gallery.search(some_vectors(1), 300)
            assert any("300 pictures were stored" in problem for problem in gallery.verify())
        assert doctor._gallery(folder, None).exit_code == 6


@pytest.fixture
def closed(tmp_path):
    """The folder of a gallery with pictures of a camera, closed."""
    with Gallery.open(tmp_path / "g", FINGERPRINT, DIM, create=True) as gallery:
        items = [Item(key=f"k{i}", camera="gate", attributes={"a": i}) for i in range(4)]
        gallery.add(items, some_vectors(4))
    return tmp_path / "g"


@pytest.mark.parametrize("column", ["camera", "attributes", "source"])
def test_an_altered_row_is_not_replaced(closed, column):
    """The new item would take over its camera, and the sums would lose what tells of it."""
    sql(closed, f"UPDATE items SET {column} = 'hall' WHERE key = 'k1'")
    with Gallery.open(closed) as gallery:
        with pytest.raises(IntegrityError, match="picture with id 2 was altered"):
            gallery.add([Item(key="new"), Item(key="k1")], some_vectors(2, 1))
        assert gallery.count() == 4
        assert any("k1: " in problem for problem in gallery.verify())
        gallery.add([Item(key="k0")], some_vectors(1, 2))  # Others are.


@pytest.mark.parametrize("end", [b"\x9d", b"\n"])
def test_a_definition_that_cannot_be_read_is_damage_in_one_line(closed, end):
    file = closed / "gallery.sqlite"
    file.write_bytes(file.read_bytes().replace(b"items_adding BEFORE", b"items_adding B" + end * 5))
    with pytest.raises(IntegrityError, match="is damaged or not a gallery") as error:
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
        with pytest.raises(IntegrityError, match="the log of changes is not what it should be"):
            changes[change]()
        assert gallery.count() == 4


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


def test_doctor_tells_of_damage(tmp_path):
    with Gallery.open(tmp_path / "g", FINGERPRINT, DIM, create=True) as gallery:
        gallery.add(
            [Item(key=f"k{i}", camera=f"camera-{i % 3}", time=float(i)) for i in range(400)],
            some_vectors(400),
        )

    assert doctor._gallery(tmp_path / "g", None).status == "ok"
    path = tmp_path / "g" / "gallery.sqlite"
    healthy = path.read_bytes()
    # An entry of the index of cameras: rows and SQLite's structure stay as they are.
    sql_of_page = "SELECT rootpage FROM sqlite_master WHERE name = 'items_by_camera_time'"
    ((page,),) = sql(tmp_path / "g", sql_of_page)
    entry = healthy.index(b"camera-1", 4096 * (page - 1), 4096 * page)
    path.write_bytes(healthy[: entry + 7] + b"0" + healthy[entry + 8 :])
    found = doctor._gallery(tmp_path / "g", None)
    assert (found.status, found.exit_code) == ("fail", 6)
    assert "restore it from a copy" in found.detail

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
from upperson_rt.gallery import Gallery, Item
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

"""Files that are not what was written: answers are right, or there are none."""

import os
import signal
import subprocess
import sys

import pytest

from tests.helpers.command_line import SOURCES
from tests.helpers.gallery_places import DIM, FINGERPRINT, some_vectors, sql
from upperson_rt import doctor
from upperson_rt.errors import IntegrityError
from upperson_rt.gallery import Gallery, Item

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

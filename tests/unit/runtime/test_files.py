import errno
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.helpers.command_line import environment
from tests.helpers.refused import refused
from upperson_rt import files
from upperson_rt.errors import InputError
from upperson_rt.files import new_folder, remove_leftovers, require_place, write_atomically

FILLING = """
import sys
from upperson_rt.files import new_folder

with new_folder(sys.argv[1], lambda _: []) as folder:
    (folder / "half").write_text("half")
    print(folder.name, flush=True)
    sys.stdin.read()
"""
WRITING = """
import os, sys
from pathlib import Path
from upperson_rt.files import write_atomically

def wait(handle):
    print("written", flush=True)
    sys.stdin.read()

os.fsync = wait
write_atomically(Path(sys.argv[1]), "half")
"""
SWAPPING = """
import os, sys
from upperson_rt import files

files._exchange = lambda *_: False
real = os.rename

def rename(source, target):
    real(source, target)
    print("moved", flush=True)
    sys.stdin.read()

os.rename = rename
with files.new_folder(sys.argv[1], lambda _: []) as folder:
    (folder / "new").write_text("new")
"""


def nothing(_):
    return []


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def out(tmp_path):
    """An older result."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    return tmp_path / "out"


@contextmanager
def running(code, path):
    """A process that is in the middle of ``new_folder``; yields it and the first line it says."""
    code = code.replace("sys.argv[1]", "__import__('pathlib').Path(sys.argv[1])")
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, str(path)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_atomically(tmp_path / "deep" / "a.txt", "one")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with refused("cannot_write", InputError):
        write_atomically(tmp_path / "deep" / "a.txt", "two")
    assert (tmp_path / "deep" / "a.txt").read_text() == "one"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="what is open cannot be replaced there")
def test_who_reads_a_file_while_it_is_replaced_reads_the_old_one_to_its_end(tmp_path):
    write_atomically(tmp_path / "a.txt", "one")
    with (tmp_path / "a.txt").open() as reader:
        write_atomically(tmp_path / "a.txt", "two")
        assert reader.read() == "one"
    assert (tmp_path / "a.txt").read_text() == "two"


@pytest.mark.parametrize("exchange", [True, False], ids=["one step", "renames"])
def test_an_older_folder_is_replaced(tmp_path, out, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    with new_folder(out, nothing) as folder:
        assert names(out) == ["old"]
        (folder / "new").write_text("new")
    assert names(tmp_path) == ["out", "out/new"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_linux_exchanges_folders_in_one_step(tmp_path, out):
    (tmp_path / "other").mkdir()
    assert files._exchange(tmp_path / "other", out)
    assert names(tmp_path) == ["other", "other/old", "out"]
    with pytest.raises(FileNotFoundError):
        files._exchange(tmp_path / "nothing", out)


@pytest.mark.parametrize("error", [KeyboardInterrupt, PermissionError(13, "Permission denied")])
@pytest.mark.parametrize("exchange", [True, False], ids=["one step", "renames"])
def test_an_interrupted_swap_leaves_the_older_folder(tmp_path, out, monkeypatch, error, exchange):
    real = os.rename

    def fail(*_):
        raise error

    def interrupted(source, target):
        if Path(target) == out and Path(source).suffix == ".tmp":
            raise error
        real(source, target)

    monkeypatch.setattr(files, "_exchange", fail if exchange else lambda *_: False)
    monkeypatch.setattr(os, "rename", interrupted)
    with (
        pytest.raises((KeyboardInterrupt, InputError)),
        new_folder(out, nothing) as folder,
    ):
        (folder / "new").write_text("new")
    assert names(tmp_path) == ["out", "out/old"]


@pytest.mark.parametrize("exchange", [True, False], ids=["one step", "renames"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "Input/output error")])
@pytest.mark.parametrize("there", [True, False])
def test_a_name_that_is_not_on_disk_does_not_count(
    tmp_path, out, monkeypatch, exchange, error, there
):
    def fail(folder):
        if folder == tmp_path:
            raise error

    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    monkeypatch.setattr(files, "sync_folder", fail)
    place = out if there else tmp_path / "other"
    with pytest.raises((KeyboardInterrupt, InputError)), new_folder(place, nothing) as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path) == ["out", "out/old"]


def test_a_file_system_that_cannot_sync_folders_is_used_without(tmp_path, monkeypatch):
    real, number = os.fsync, errno.EINVAL

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(tmp_path / "a", "one")
    assert (tmp_path / "a").read_text() == "one"
    number = errno.EIO
    with refused("cannot_write", InputError, path=str(tmp_path / "a")):
        write_atomically(tmp_path / "a", "two")


def test_a_full_disk_is_named_and_leaves_the_older_folder(tmp_path, out):
    with (
        refused("disk_full", InputError, path=str(out)),
        new_folder(out, nothing),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError), new_folder(out, nothing):
        raise PermissionError(13, "Permission denied")  # Not of our writing.
    assert names(tmp_path) == ["out", "out/old"]


def test_what_comes_into_the_older_folder_meanwhile_is_not_lost(tmp_path, out):
    with (
        refused("unowned_files", InputError, names="mine"),
        new_folder(out, lambda folder: {path.name for path in folder.iterdir()} - {"old"}),
    ):
        (out / "mine").write_text("mine")
    assert names(tmp_path) == ["out", "out/mine", "out/old"]


@pytest.mark.parametrize("make", [require_place, lambda path: new_folder(path).__enter__()])
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("file", "no_folder"),
        ("file/bundle", "no_folder"),
        ("folder", "unowned_files"),
        (".", "working_folder"),
        ("/proc", "mount_point"),
    ],
)
def test_what_is_not_ours_is_refused(tmp_path, monkeypatch, make, name, code):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for mine in "abcd":
        (tmp_path / "folder" / mine).write_text("mine")
    before = names(tmp_path)
    with refused(code, InputError):
        make(Path(name))
    assert names(tmp_path) == before


def test_a_folder_that_is_not_writable_is_told_and_nothing_is_made(tmp_path, monkeypatch):
    asked = []

    def access(path, mode):
        asked.append((path, mode))
        return False

    monkeypatch.setattr(os, "access", access)  # The tests may run as root, who may write anywhere.
    with refused("not_writable", InputError, path=str(tmp_path)):
        require_place(tmp_path / "deep" / "out")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]
    assert names(tmp_path) == []


def test_what_a_dead_process_left_is_swept_and_what_a_live_one_fills_is_not(tmp_path, out):
    (tmp_path / ".out.backup").mkdir()  # Mine, and so is the file.
    (tmp_path / ".out.abcdefgh.tmp").write_text("mine")
    mine = names(tmp_path)
    with running(FILLING, out) as (dead, left):
        dead.kill()
        dead.wait(30)
    assert (tmp_path / left / "half").exists()
    with running(FILLING, out) as (_, filling):
        with new_folder(out, nothing) as folder:
            (folder / "old").write_text("new")
        assert names(tmp_path) == sorted([*mine, filling, f"{filling}/half"])
    with new_folder(out, nothing) as folder:
        (folder / "old").write_text("newer")
    assert names(tmp_path) == mine


def seen_at(path):
    """What is at a place while a folder for it is filled, which then stops; None for nothing."""
    found = None
    with suppress(KeyboardInterrupt), new_folder(path, nothing):
        found = names(path) if path.exists() else None
        raise KeyboardInterrupt
    return found


def test_a_process_that_dies_between_two_renames_loses_nothing(tmp_path, out):
    with running(SWAPPING, out) as (process, said):
        assert said == "moved"
        assert seen_at(out) is None  # The process is alive and will go on.
        process.kill()
        process.wait(30)
    assert not out.exists()
    assert seen_at(out) == ["old"]
    assert names(tmp_path) == ["out", "out/old"]


def test_threads_that_write_at_once_do_not_change_the_permissions_of_what_comes_later():
    """The system tells its mask only to whoever sets another one meanwhile."""
    before = os.umask(0o027)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            seen = {mask for masks in pool.map(read_masks, range(8)) for mask in masks}
    finally:
        sys.setswitchinterval(interval)
        after = os.umask(before)
    assert (seen, after) == ({0o027}, 0o027)


def read_masks(_):
    return {files._umask() for _ in range(5000)}


@contextmanager
def writing(path):
    """Give a process in the middle of writing a file."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITING, path],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "written\n"
        yield process
        process.kill()


def test_the_next_write_removes_what_a_killed_one_left_and_no_other(tmp_path):
    path = tmp_path / "watch.prom"
    with writing(path) as killed:
        killed.kill()
        killed.wait()
    (left,) = tmp_path.iterdir()
    with writing(path):
        (living,) = set(tmp_path.iterdir()) - {left}
        others = [".watch.prom.abc", ".watch.prom.abcdefgh.txt", ".other.prom.abcdefgh"]
        for name in others:
            (tmp_path / name).touch()
        (tmp_path / ".watch.prom.abcd_link").symlink_to(tmp_path / others[0])
        os.mkfifo(tmp_path / ".watch.prom.abcd_fif")
        write_atomically(path, "whole")
        assert path.read_text() == "whole"
        expected = {"watch.prom", living.name, *others, ".watch.prom.abcd_link"}
        assert {found.name for found in tmp_path.iterdir()} == expected


def test_threads_that_write_one_file_do_not_sweep_each_other(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: write_atomically(tmp_path / "a", f"{n:0>9999}"), range(200)))
    assert names(tmp_path) == ["a"]
    assert len((tmp_path / "a").read_text()) == 9999


def test_a_folder_that_was_left_goes_after_an_hour(tmp_path):
    for name in ("abcdefgh", "12345678"):
        (tmp_path / f".gallery.sqlite.{name}").mkdir()
        (tmp_path / f".gallery.sqlite.{name}" / "gallery.sqlite").touch()
    os.utime(tmp_path / ".gallery.sqlite.abcdefgh", (1e9, 1e9))
    remove_leftovers(tmp_path / "gallery.sqlite")
    assert [path.name for path in tmp_path.iterdir()] == [".gallery.sqlite.12345678"]
    remove_leftovers(tmp_path / "missing" / "gallery.sqlite")

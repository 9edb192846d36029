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
from upperson_rt.files import (
    new_folder,
    put_in_place,
    remove_leftovers,
    require_place,
    write_atomically,
)

FILLING = """
with files.new_folder(path, lambda _: []) as folder:
    (folder / "half").write_text("half")
    stop_at(folder.name)
"""
WRITING = """
os.fsync = lambda handle: stop_at("written")
files.write_atomically(path, "half")
"""
SWAPPING = """
files._exchange = lambda *_: False
real = os.rename
os.rename = lambda source, target: (real(source, target), stop_at("moved"))
with files.new_folder(path, lambda _: []) as folder:
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


def failing(error):
    def fail(*_):
        raise error

    return fail


@pytest.fixture(params=[True, False], ids=["one step", "renames"])
def exchange(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    return request.param


@contextmanager
def running(code, path):
    """A process that has stopped in the middle of its work; yields it and where that is."""
    start = """
import os, pathlib, sys
from upperson_rt import files
path = pathlib.Path(sys.argv[1])

def stop_at(place):
    print(place, flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", start + code, str(path)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def killed(code, path):
    """Let a process be killed in the middle of its work, and return where that was."""
    with running(code, path) as (_, place):
        return place


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a.txt"
    write_atomically(path, "one")
    with path.open() as reader:
        write_atomically(path, "two", private=True)
        assert reader.read() == "one", "a reader of the old one reads it to its end"
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("two", 0o600)
    monkeypatch.setattr(os, "fsync", failing(OSError(28, "No space left on device")))
    with refused("cannot_write", InputError):
        write_atomically(path, "three")
    assert path.read_text() == "two"
    assert [path.name for path in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, PermissionError(13, "Permission denied")])
def test_an_interrupted_swap_leaves_the_older_folder(tmp_path, out, monkeypatch, error, exchange):
    real = os.rename

    def interrupted(source, target):
        if Path(target) == out and Path(source).suffix == ".tmp":
            raise error
        real(source, target)

    if exchange:
        monkeypatch.setattr(files, "_exchange", failing(error))
    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises((KeyboardInterrupt, InputError)), new_folder(out, nothing) as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path) == ["out", "out/old"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "Input/output error")])
def test_a_name_that_is_not_on_disk_does_not_count(tmp_path, out, monkeypatch, exchange, error):
    def fail(folder):
        if folder == tmp_path:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync_folder", fail)
        for place in ("out", "other"):
            interrupted = pytest.raises((KeyboardInterrupt, InputError))
            with interrupted, new_folder(tmp_path / place, nothing) as folder:
                (folder / "new").write_text("new")
            assert names(tmp_path) == ["out", "out/old"]
        (tmp_path / "file").touch()
        with pytest.raises((KeyboardInterrupt, InputError)):
            put_in_place(tmp_path / "file", tmp_path / "renamed")
        (tmp_path / "renamed").unlink()
    with new_folder(out, nothing) as folder:
        assert names(out) == ["old"]
        (folder / "new").write_text("new")
    assert names(tmp_path) == ["out", "out/new"]


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


def test_errors_and_new_files_of_others_leave_the_older_folder(tmp_path, out):
    with refused("disk_full", InputError, path=str(out)), new_folder(out, nothing):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError), new_folder(out, nothing):
        raise PermissionError(13, "Permission denied")  # Not of our writing.
    assert names(tmp_path) == ["out", "out/old"]
    own = {"old"}
    with (
        refused("unowned_files", InputError, names="mine"),
        new_folder(out, lambda folder: {path.name for path in folder.iterdir()} - own),
    ):
        (out / "mine").write_text("mine")
    assert names(tmp_path) == ["out", "out/mine", "out/old"]


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
def test_what_is_not_ours_is_refused(tmp_path, monkeypatch, name, code):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for mine in "abcd":
        (tmp_path / "folder" / mine).write_text("mine")
    before = names(tmp_path)
    with refused(code, InputError), new_folder(Path(name)):
        pass
    assert names(tmp_path) == before


def test_nothing_is_made_in_a_folder_that_is_not_writable(tmp_path, monkeypatch):
    checked = []
    # The tests may run as root, who may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: checked.append((path, mode)))
    with refused("not_writable", InputError, path=str(tmp_path)):
        require_place(tmp_path / "deep" / "out")
    assert checked == [(tmp_path, os.W_OK | os.X_OK)]
    assert names(tmp_path) == []


def test_what_a_dead_process_left_is_swept_and_what_a_live_one_fills_is_not(tmp_path, out):
    (tmp_path / ".out.backup").mkdir()  # Mine, and so is the file.
    (tmp_path / ".out.abcdefgh.tmp").write_text("mine")
    mine = names(tmp_path)
    left = killed(FILLING, out)
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
    with running(SWAPPING, out) as (process, place):
        assert place == "moved"
        assert seen_at(out) is None  # The process is alive and will go on.
        process.kill()
        process.wait(30)
    assert not out.exists()
    assert seen_at(out) == ["old"]
    assert names(tmp_path) == ["out", "out/old"]


def test_threads_that_write_at_once_do_not_change_the_permissions_of_what_comes_later():
    """The system returns its mask only when another one is set meanwhile."""
    before = os.umask(0o027)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = set(pool.map(lambda _: files._umask(), range(10_000)))
    finally:
        sys.setswitchinterval(interval)
        after = os.umask(before)
    assert (found, after) == ({0o027}, 0o027)


def test_the_next_write_removes_what_a_killed_one_left_and_no_other(tmp_path):
    path = tmp_path / "watch.prom"
    assert killed(WRITING, path) == "written"
    (left,) = tmp_path.iterdir()
    with running(WRITING, path):
        (living,) = set(tmp_path.iterdir()) - {left}
        others = [".watch.prom.abc", ".watch.prom.abcdefgh.txt", ".other.prom.abcdefgh"]
        for name in others:
            (tmp_path / name).touch()
        (tmp_path / ".watch.prom.abcd_link").symlink_to(tmp_path / others[0])
        os.mkfifo(tmp_path / ".watch.prom.abcd_fif")
        write_atomically(path, "whole")
        assert path.read_text() == "whole"
        assert set(names(tmp_path)) == {path.name, living.name, *others, ".watch.prom.abcd_link"}


def test_threads_that_write_one_file_do_not_sweep_each_other(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: write_atomically(tmp_path / "a", f"{n:0>9999}"), range(100)))
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

"""What a power failure may leave of a folder, at every moment of a process that writes into it.

``disk_calls.c`` reports each call that syncs or changes names before it is made. POSIX promises
no more than this: a file has the content of its last fsync, a folder the names of its last fsync.
What came later may be there or not, so several states are possible at one moment. A file that was
never synced is empty in all of them.
"""

import os
import selectors
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import pytest

from tests.helpers.command_line import environment

Files: TypeAlias = Mapping[str, bytes]
"""Content by relative path; that of a folder, which ends in a slash, is empty."""

_Names: TypeAlias = dict[str, int]
"""Inodes by name."""


@dataclass(frozen=True)
class Call:
    """A call that was made; its paths are relative to the folder."""

    name: str
    """``fsync``, ``rename``, ``exchange``, ``link``, ``unlink`` or ``mkdir``."""
    path: str
    to: str = ""


@dataclass
class Recording:
    """What a process did to a folder, and what could have been left of it."""

    calls: list[Call] = field(default_factory=list)
    states: list[Files] = field(default_factory=list)
    """Every state that a power failure during the process could leave, once."""
    final: list[Files] = field(default_factory=list)
    """Those that a power failure after its end could leave."""


def record(code: str, folder: Path, *arguments: object, library: Path) -> Recording:
    """Run Python code in a folder, in its own process; what is there is taken to be on disk."""
    disk, recording = _Disk(folder), Recording()
    address = str(library.with_name(f"{os.getpid()}.socket"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=folder,
            env=environment() | {"LD_PRELOAD": str(library), "DISK_CALLS": address},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        ended = threading.Event()
        listening = threading.Thread(target=_listen, args=(listener, disk, recording, ended))
        listening.start()
        try:
            output, _ = process.communicate()
        finally:
            ended.set()
            listening.join()
            Path(address).unlink()
    assert process.returncode == 0, output
    recording.final = list({frozenset(s.items()): s for s in disk.states()}.values())
    return recording


def build_disk_calls(folder: Path) -> Path:
    """Build the library that `record` needs, or skip the test where that cannot be done."""
    if sys.platform != "linux":
        pytest.skip("calls are only watched on Linux")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    target = folder / "disk_calls.so"
    source = Path(__file__).with_name("disk_calls.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", target, source, "-ldl"], check=True)
    return target


def write_files(files: Files, folder: Path) -> Path:
    folder.mkdir()
    for name, content in sorted(files.items()):
        if name.endswith("/"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return folder


def below(files: Files, name: str) -> Files:
    """Return the part of a state that lies in one of its folders."""
    return {
        path.removeprefix(f"{name}/"): content
        for path, content in files.items()
        if path.startswith(f"{name}/") and path != f"{name}/"
    }


class _Disk:
    """What of a folder is on disk for certain, and what may be."""

    def __init__(self, folder: Path) -> None:
        self._root = folder
        # Open files keep their inodes' numbers from being used again.
        self._held: dict[int, int] = {}
        self._names: dict[int, _Names] = {}
        self._content: dict[int, bytes] = {}
        self._names = self._now()
        for inode, handle in self._held.items():
            if inode not in self._names:
                self._content[inode] = Path(f"/proc/self/fd/{handle}").read_bytes()

    def sync(self, path: Path) -> None:
        """Take a file or folder as synced; it may have no name any more."""
        inode = path.stat().st_ino
        if path.is_dir():
            self._names[inode] = self._now()[inode]
        else:
            self._content[inode] = path.read_bytes()

    def states(self) -> Iterator[Files]:
        """Yield what a power failure may leave now; some of it several times."""
        now = self._now()
        durable = {folder: self._names.get(folder, {}) for folder in now} | self._names
        yield self._files(durable)
        yield self._files(durable | now)
        for folder, names in now.items():
            for change in _changes(durable[folder], names):
                altered = {folder: _changed(durable[folder], names, change)}
                yield self._files(durable | altered)
                yield self._files(durable | now | altered)

    def _files(self, folders: dict[int, _Names]) -> Files:
        found: dict[str, bytes] = {}

        def walk(folder: int, prefix: str) -> None:
            for name, inode in folders[folder].items():
                if inode in folders:
                    found[f"{prefix}{name}/"] = b""
                    walk(inode, f"{prefix}{name}/")
                else:
                    found[f"{prefix}{name}"] = self._content.get(inode, b"")

        walk(self._root.stat().st_ino, "")
        return found

    def _now(self) -> dict[int, _Names]:
        """Return the names in every folder, whether they are on disk or not."""
        while True:
            with suppress(FileNotFoundError):  # Another thread removed it meanwhile.
                return self._walked()

    def _walked(self) -> dict[int, _Names]:
        folders: dict[int, _Names] = {}
        waiting = [self._root]
        while waiting:
            place = waiting.pop()
            names: _Names = {}
            with os.scandir(place) as entries:
                for entry in entries:
                    inode = names[entry.name] = entry.inode()
                    if inode not in self._held:
                        self._held[inode] = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW)
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
            folders[place.stat().st_ino] = names
        return folders

    def __del__(self) -> None:
        for handle in self._held.values():
            os.close(handle)


def _changes(before: _Names, after: _Names) -> list[set[str]]:
    """Return the names that change, those that one rename changes together."""
    groups: list[set[str]] = []
    for name in before.keys() | after.keys():
        if before.get(name) == after.get(name):
            continue
        inodes = {before.get(name), after.get(name)} - {None}
        group = {name}
        for other in [g for g in groups if inodes & _inodes(g, before, after)]:
            groups.remove(other)
            group |= other
        groups.append(group)
    return groups


def _inodes(names: set[str], before: _Names, after: _Names) -> set[int | None]:
    return {found.get(name) for name in names for found in (before, after)} - {None}


def _changed(before: _Names, after: _Names, names: set[str]) -> _Names:
    mixed = {**before, **{name: after[name] for name in names if name in after}}
    return {name: inode for name, inode in mixed.items() if name in after or name not in names}


def calls_of(
    listener: socket.socket, is_over: Callable[[], bool]
) -> Iterator[tuple[socket.socket, bytes]]:
    """Yield calls of processes, each with the connection where an answer is waited for."""
    with ExitStack() as connections, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while not is_over():
            for key, _ in selector.select(timeout=0.01):
                if key.fileobj is listener:  # At the end a process may still have one open.
                    accepted = connections.enter_context(listener.accept()[0])
                    selector.register(accepted, selectors.EVENT_READ)
                    continue
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if message := connection.recv(10_000):
                    yield connection, message
                else:
                    selector.unregister(connection)
                    connection.close()


def _listen(
    listener: socket.socket, disk: _Disk, recording: Recording, ended: threading.Event
) -> None:
    """Answer calls until the process has ended."""
    seen: set[frozenset[tuple[str, bytes]]] = set()
    for connection, message in calls_of(listener, ended.is_set):
        try:
            _note(connection, message, disk, recording, seen)
        finally:
            connection.send(b".")


def _note(
    connection: socket.socket,
    message: bytes,
    disk: _Disk,
    recording: Recording,
    seen: set[frozenset[tuple[str, bytes]]],
) -> None:
    name, *places = os.fsdecode(message).split("\0")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    process = Path(f"/proc/{struct.unpack('3i', credentials)[0]}")
    root = disk._root
    paths = [
        path
        for at, place in zip(places[::2], places[1::2], strict=True)
        if at != "-1" and (path := _resolved(process, int(at), place)).is_relative_to(root)
    ]
    if not paths:
        return
    relative = [path.relative_to(root).as_posix() for path in paths]
    recording.calls.append(Call(name, *relative))
    for state in disk.states():
        if (key := frozenset(state.items())) not in seen:
            seen.add(key)
            recording.states.append(state)
    if name == "fsync":
        disk.sync(process / "fd" / places[0])


def _resolved(process: Path, at: int, place: str) -> Path:
    start = process / "cwd" if at == -100 else process / "fd" / str(at)
    return Path(os.path.normpath(os.readlink(start))) / place

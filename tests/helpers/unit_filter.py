"""Run a program under the seccomp filters that systemd makes of a unit file.

    python -m tests.helpers.unit_filter deploy/upperson-watch.service PROGRAM ARGUMENT...

It reads `SystemCallFilter`, `SystemCallErrorNumber` and `RestrictAddressFamilies`, and knows the
groups of `systemd_syscalls.txt`. The filters are made with libseccomp, as systemd makes them.
"""

import ctypes
import ctypes.util
import errno
import os
import socket
import sys
from pathlib import Path
from typing import Any

_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_EQUAL = 4
_MOST_FAMILIES = 64
_LISTS = Path(__file__).with_name("systemd_syscalls.txt")


class _Comparison(ctypes.Structure):
    _fields_ = [
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    ]


def reason_to_skip() -> str | None:
    if sys.platform != "linux":
        return "seccomp is of Linux"
    if ctypes.util.find_library("seccomp") is None:
        return "libseccomp.so.2 is not installed"
    if "Seccomp:" not in Path("/proc/self/status").read_text():
        return "this kernel has no seccomp"
    return None


def settings_of(unit: Path) -> list[tuple[str, str]]:
    """Return the settings of a unit file in their order, whatever their section."""
    lines = unit.read_text().splitlines()
    split = [line.partition("=") for line in lines if "=" in line and not line.startswith("#")]
    return [(name.strip(), value.strip()) for name, _, value in split]


def allowed_calls(unit: Path) -> set[str]:
    """Return the system calls that a unit allows; its first list must be one of allowed calls."""
    text = "\n".join(line for line in _LISTS.read_text().splitlines() if not line.startswith("#"))
    groups = {name: calls.split() for name, calls in _groups(text)}
    allowed: set[str] = set()
    for value in (value for name, value in settings_of(unit) if name == "SystemCallFilter"):
        for word in value.removeprefix("~").split():
            calls = groups[word] if word.startswith("@") else [word]
            allowed = allowed.difference(calls) if value[0] == "~" else allowed.union(calls)
    return allowed


def _groups(text: str) -> list[tuple[str, str]]:
    return [(f"@{one.partition(':')[0]}", one.partition(":")[2]) for one in text.split("@")[1:]]


def install(unit: Path) -> None:
    """Install the filters of a unit for this process and all that it starts."""
    settings = dict(settings_of(unit))
    library = ctypes.CDLL(ctypes.util.find_library("seccomp"), use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    families = [getattr(socket, name) for name in settings["RestrictAddressFamilies"].split()]
    context = _context(library, _ALLOW)
    call = library.seccomp_syscall_resolve_name(b"socket")
    for family in set(range(_MOST_FAMILIES)).difference(families):
        rule = _Comparison(0, _EQUAL, family, 0)
        refusal = _ERRNO | errno.EAFNOSUPPORT
        _check(library.seccomp_rule_add_array(context, refusal, call, 1, ctypes.byref(rule)))
    _check(library.seccomp_load(context))
    number = settings.get("SystemCallErrorNumber")
    context = _context(library, _KILL if number is None else _ERRNO | getattr(errno, number))
    for name in allowed_calls(unit):
        call = library.seccomp_syscall_resolve_name(name.encode())
        if call >= 0:  # Others are of other architectures.
            _check(library.seccomp_rule_add_array(context, _ALLOW, call, 0, None))
    _check(library.seccomp_load(context))


def _context(library: Any, default: int) -> ctypes.c_void_p:
    context = library.seccomp_init(ctypes.c_uint32(default))
    assert context is not None
    return ctypes.c_void_p(context)


def _check(result: int) -> None:
    if result:
        raise OSError(-result, os.strerror(-result))


def under(unit: Path) -> list[str]:
    """Return the command that runs what follows it under the filters of a unit."""
    return [sys.executable, "-m", __name__, str(unit)]


def main(unit: str, *command: str) -> None:
    install(Path(unit))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])

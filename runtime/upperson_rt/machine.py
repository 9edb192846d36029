"""This machine: processor, instruction sets, load, memory that is freed, and how int8 adds here."""

import ctypes
import functools
import os
import platform
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from upperson_rt import __version__
from upperson_rt.printable import count_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_CPUINFO = Path("/proc/cpuinfo")

_X86_SETS = (
    "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8",
)  # fmt: skip
_ARM_SETS = ("asimddp", "i8mm", "bf16", "sve")
_BF16_SETS = {"avx512_bf16", "amx_bf16", "bf16"}


def lower_priority() -> None:
    """Let other threads and processes go before this thread, where the system can."""
    with suppress(AttributeError, OSError):  # Priorities of threads are Linux's.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def describe_machine(*packages: str) -> dict[str, Any]:
    """Return the machine, and the versions of installed packages, as plain values.

    ``instruction_sets`` is None where the system does not list them. A ``load_average`` above
    ``cpus_available`` means that other processes compete.
    """
    cpu = processor()
    return {
        "cpu": cpu.name,
        "cpus_available": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "instruction_sets": None
        if cpu.flags is None
        else {flag: flag in cpu.flags for flag in (_X86_SETS if cpu.is_x86 else _ARM_SETS)},
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "upperson": __version__,
        **({"packages": {name: version_of(name) for name in packages}} if packages else {}),
    }


def machine_lines(machine: Mapping[str, Any], threads: int | None) -> str:
    """Return a machine (see `describe_machine`) and the threads used as two lines above a table."""
    load = machine["load_average"]
    sets = (machine["instruction_sets"] or {}).items()
    packages = machine.get("packages", {}).items()
    used = "default threads" if threads is None else count_of(threads, "thread")
    return (
        f"{machine['cpu']}, {used}, "
        f"{count_of(machine['cpus_available'], 'CPU')}, load "
        f"{'unknown' if load is None else load}"
        + "".join(f", {name} {'yes' if found else 'no'}" for name, found in sets)
        + f"\nupperson {machine['upperson']}, Python {machine['python']}, {machine['system']}"
        + "".join(f", {name} {version or 'absent'}" for name, version in packages)
    )


def version_of(package: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    from importlib import metadata  # Here: it brings a third of what opening a picture imports.

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Processor:
    """A processor as the system describes it."""

    name: str
    flags: frozenset[str] | None
    """What it can do, such as ``avx2``; None where /proc does not list it."""

    @property
    def is_x86(self) -> bool:
        """Whether it is one of Intel's or AMD's."""
        return platform.machine().lower() in ("x86_64", "amd64")

    @property
    def has_bf16(self) -> bool:
        """Whether it multiplies bf16; True where the system does not report it."""
        return self.flags is None or bool(self.flags & _BF16_SETS)


def processor() -> Processor:
    """Return the processor of this machine."""
    name, flags = platform.processor() or platform.machine(), None
    if _CPUINFO.is_file():
        with _CPUINFO.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = (part.strip() for part in line.partition(":"))
                if key == "model name":
                    name = value
                elif key in ("flags", "Features"):
                    flags = frozenset(value.split())
                elif not key and flags:  # The next core, of many.
                    break
    return Processor(name, flags)


# --- Memory that was freed goes back to the system, as far as the C library lets it
#
# glibc keeps a heap for each thread. What is freed in the middle of one stays there, and so does
# what is freed at its end, up to twice the largest block that was ever freed. Blocks up to that
# one, 32 MiB at most, are then taken from heaps, too: where work moves from thread to thread, each
# heap comes to hold as much as the work ever needed.

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # Of mallopt in malloc.h.
_LEFT_BYTES = 4 << 20
_ASKING = threading.Lock()
_largest_in_heap = sys.maxsize
"""The smallest limit that was asked for in this process."""


def trim_heap() -> None:
    """Give all back that lies free in any heap; takes some milliseconds."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def limit_heap(largest_in_heap: int) -> None:
    """Trim heaps early and take larger blocks from the system; a later, smaller limit wins."""
    global _largest_in_heap
    with _ASKING:
        if _largest_in_heap <= largest_in_heap:
            return
        _largest_in_heap = largest_in_heap
        if (libc := _glibc()) is not None:
            # Either stops the growth of both.
            libc.mallopt(_MMAP_THRESHOLD, largest_in_heap)
            libc.mallopt(_TRIM_THRESHOLD, _LEFT_BYTES)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    found = ctypes.CDLL(None) if sys.platform == "linux" else None
    return found if hasattr(found, "malloc_trim") else None


# --- Int8 on x86 processors without VNNI: what saturates there, and what cannot
#
# They add the products of two neighbouring inputs in saturating 16 bits (``vpmaddubsw``), with
# activations moved from -128..127 to 0..255. Two int8 weights that add up to 128 at the most stay
# below 2**15 with any activations (255 * 128 = 32,640), so such a graph is the same on every CPU.
# The exporter makes int8 for CPUs that way and says so in the file; what does not say so is
# computed in float where it would saturate, or not at all.

PAIR_LIMIT = 128
"""The most that the absolute values of two neighbouring weights may add up to."""

INT8_SUMS, EXACT = "int8_sums", "exact"
"""Key and value in the metadata of an ONNX file whose weights keep `PAIR_LIMIT`."""

_EXACT_SETS = {"avx_vnni", "avx512_vnni", "amx_int8"}


def int8_sums_saturate() -> bool:
    """Whether this processor adds int8 products in 16 bits; ARM processors add in 32."""
    found = processor()
    return found.is_x86 and found.flags is not None and not found.flags & _EXACT_SETS


def largest_pair(w_IO: "NDArray[Any]") -> "NDArray[np.float32]":
    """Return the largest sum [out] of two neighbouring inputs' absolute weights [in, out]."""
    import numpy as np  # Here: command lines start without it.

    even_IO = np.abs(w_IO.astype(np.float32))
    if len(even_IO) % 2:
        even_IO = np.pad(even_IO, ((0, 1), (0, 0)))
    pairs_O: NDArray[np.float32] = (even_IO[::2] + even_IO[1::2]).max(axis=0)
    return pairs_O


_STATUS = Path("/proc/self/status")


def resident_bytes(field: Literal["VmRSS", "VmHWM"]) -> int | None:
    """Return the memory this process has resident now, or had at its peak (VmHWM); on Linux."""
    # Not getrusage: on Linux its maximum survives exec, and would be the parent's.
    if _STATUS.is_file():
        for line in _STATUS.read_text("ascii", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None

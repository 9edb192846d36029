"""What the figures of a benchmark or report depend on: processor, load, versions, memory."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from upperson_rt import __version__
from upperson_rt.machine import processor, version_of
from upperson_rt.printable import count_of

_X86_SETS = (
    "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8",
)  # fmt: skip
_ARM_SETS = ("asimddp", "i8mm", "bf16", "sve")
_STATUS = Path("/proc/self/status")


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


def resident_bytes(field: Literal["VmRSS", "VmHWM"]) -> int | None:
    """Return the memory this process has resident now, or had at its peak (VmHWM); on Linux."""
    # Not getrusage: on Linux its maximum survives exec, and would be the parent's.
    if _STATUS.is_file():
        for line in _STATUS.read_text("ascii", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None

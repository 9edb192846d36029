"""The machine that a measurement ran on: processor, instruction sets, load, system."""

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from upperson_rt import __version__

__all__ = ["describe_machine", "machine_lines"]

_CPUINFO = Path("/proc/cpuinfo")

_X86_SETS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8",
)  # fmt: skip
_ARM_SETS = ("asimddp", "i8mm", "bf16", "sve")


def describe_machine(*packages: str) -> dict[str, Any]:
    """Return the machine, and the versions of installed packages, as plain values.

    ``instruction_sets`` says for each one that matters to matrix products whether the processor has
    it; it is None where the system does not tell (Linux does). ``load_average`` is the mean number
    of running processes in the last minute: where it exceeds ``cpus_available``, others compete.
    """
    name, flags = _processor()
    return {
        "cpu": name,
        "cpus_available": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "instruction_sets": None
        if flags is None
        else {flag: flag in flags for flag in (_ARM_SETS if _is_arm() else _X86_SETS)},
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "upperson": __version__,
        **({"packages": {name: _version(name) for name in packages}} if packages else {}),
    }


def machine_lines(machine: Mapping[str, Any], threads: int | None) -> str:
    """Return a machine (see `describe_machine`) and the threads used as two lines above a table."""
    load = machine["load_average"]
    sets = (machine["instruction_sets"] or {}).items()
    packages = machine.get("packages", {}).items()
    return (
        f"{machine['cpu']}, {threads or 'default'} threads, {machine['cpus_available']} CPUs, load "
        f"{'unknown' if load is None else load}"
        + "".join(f", {name} {'yes' if found else 'no'}" for name, found in sets)
        + f"\nupperson {machine['upperson']}, Python {machine['python']}, {machine['system']}"
        + "".join(f", {name} {version or 'absent'}" for name, version in packages)
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _is_arm() -> bool:
    return platform.machine().lower() in ("aarch64", "arm64")


def _processor() -> tuple[str, set[str] | None]:
    """Return the processor's name and its flags; flags are None where /proc has none."""
    name, flags = platform.processor() or platform.machine(), None
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text("utf-8", errors="replace").splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                name = value
            elif key in ("flags", "Features"):
                flags = set(value.split())
    return name, flags

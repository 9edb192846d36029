"""The machine that a measurement ran on: processor, instruction sets, load, system."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from upperson_rt import __version__
from upperson_rt.printable import count_of

__all__ = ["Processor", "describe_machine", "machine_lines", "processor", "version_of"]

_CPUINFO = Path("/proc/cpuinfo")

_X86_SETS = (
    "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8",
)  # fmt: skip
_ARM_SETS = ("asimddp", "i8mm", "bf16", "sve")
_BF16_SETS = {"avx512_bf16", "amx_bf16", "bf16"}


def describe_machine(*packages: str) -> dict[str, Any]:
    """Return the machine, and the versions of installed packages, as plain values.

    ``instruction_sets`` says for each one that matters to matrix products whether the processor has
    it; it is None where the system does not tell (Linux does). ``load_average`` is the mean number
    of running processes in the last minute: where it exceeds ``cpus_available``, others compete.
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
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Processor:
    """A processor as the system describes it."""

    name: str
    flags: frozenset[str] | None
    """What it can do, such as ``avx2``; None where /proc does not tell."""

    @property
    def is_x86(self) -> bool:
        """Whether it is one of Intel's or AMD's."""
        return platform.machine().lower() in ("x86_64", "amd64")

    @property
    def has_bf16(self) -> bool:
        """Whether it multiplies bf16; True where the system does not tell."""
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

"""What a measurement ran on: processor, instruction sets, threads, versions."""

import os
import platform
from pathlib import Path
from typing import Any

import open_clip
import torch

from upperson_rt import __version__

_CPUINFO = Path("/proc/cpuinfo")
_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


def describe_hardware() -> dict[str, Any]:
    """Return the machine and the software as plain values.

    ``instruction_sets`` says for each one that matters to training whether the processor has it;
    it is None where the system does not tell (Linux on x86 does).
    """
    name, flags = _processor()
    return {
        "cpu": name,
        "cpus_available": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "instruction_sets": None
        if flags is None
        else {flag: flag in flags for flag in _INSTRUCTION_SETS},
        "torch_kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "open_clip": str(open_clip.__version__),
        "upperson": __version__,
    }


def _processor() -> tuple[str, set[str] | None]:
    """Return the processor's name and its flags; flags are None where /proc has none."""
    name, flags = platform.processor() or platform.machine(), None
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text("utf-8", errors="replace").splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                name = value
            elif key == "flags":
                flags = set(value.split())
    return name, flags

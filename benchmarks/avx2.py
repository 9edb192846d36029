"""Run a command as on a processor with AVX2 alone, at the real processor's speed.

    python -m benchmarks.avx2 upperson-rt bench towers -b demo/bundle

Processors without AVX-512 and VNNI are common in clouds and on desks. Libraries choose their
kernels by the CPUID instruction and /proc/cpuinfo: both tell every Python that the command starts
of AVX2 and nothing newer. It needs Linux on x86-64, a processor that can fault CPUID
(``cpuid_fault`` in /proc/cpuinfo), ``cc`` and ``unshare``. An emulator (``qemu-x86_64 -cpu
Haswell``) needs none of them, but takes twenty times as long.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

_SOURCE = Path(__file__).with_suffix(".c")
_NEWER = re.compile(r"\b(avx512\w*|avx_vnni\w*|avx10\w*|amx_\w+|gfni|vaes|vpclmulqdq)\b ?")
_MOUNT_AND_RUN = 'mount --bind "$0" /proc/cpuinfo && exec "$@"'
_GLIBC = "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX512CD,-AVX512DQ"


@cache
def missing() -> str | None:
    """Return what this machine lacks for it, or None."""
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    if "cpuid_fault" not in flags:
        return "the processor, or the system, cannot fault CPUID: see cpuid_fault in /proc/cpuinfo"
    mount = [*_namespace(), "mount", "--bind", "/proc/cpuinfo", "/proc/cpuinfo"]
    for tried, problem in (
        (["cc", "-fsyntax-only", str(_SOURCE)], "there is no C compiler with its headers"),
        (mount, "unshare makes no namespace in which /proc/cpuinfo can be another"),
    ):
        if shutil.which(tried[0]) is None:
            return f"{tried[0]} is not installed"
        if subprocess.run(tried, capture_output=True).returncode:
            return problem
    return None


def run(command: list[str], folder: Path) -> int:
    """Run a command and return its exit code; `folder` takes what it needs meanwhile."""
    folder.chmod(0o755)  # The command may start processes of other users.
    library, cpuinfo = folder / "avx2.so", folder / "cpuinfo"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, _SOURCE], check=True)
    cpuinfo.write_text(_NEWER.sub("", Path("/proc/cpuinfo").read_text()))
    environment = {"LD_PRELOAD": str(library), "GLIBC_TUNABLES": _GLIBC}
    started = [*_namespace(), "sh", "-c", _MOUNT_AND_RUN, str(cpuinfo), *command]
    return subprocess.run(started, env=os.environ | environment).returncode


def _namespace() -> list[str]:
    as_root = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    return ["unshare", *as_root, "--mount"]


def main() -> None:
    """Run the command of the process's arguments and end with its exit code."""
    if sys.argv[1:] in ([], ["--help"], ["-h"]):
        sys.stdout.write(f"{__doc__}")
        return
    if lacking := missing():
        sys.exit(f"error: {lacking}")
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(run(sys.argv[1:], Path(folder)))


if __name__ == "__main__":
    main()

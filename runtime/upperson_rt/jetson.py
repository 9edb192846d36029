"""What a Jetson needs: its TensorRT and OpenCV come with JetPack, PyPI has neither for it."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["ADVICE", "OLDEST_RELEASE", "jetson_advice", "jetson_line", "jetson_release"]

ADVICE = (
    "use JetPack's TensorRT (sudo apt install python3-libnvinfer) in a virtual environment made "
    "with --system-site-packages, see docs/jetson.md"
)

OLDEST_RELEASE = (36, 4)
"""Jetson Linux of JetPack 6.1, the first with TensorRT 10.3."""

_TEGRA = Path("/etc/nv_tegra_release")


def jetson_line() -> str | None:
    """Return how a Jetson names its Linux, ``R36 (release), REVISION: 4.3``; None elsewhere."""
    if not _TEGRA.is_file():
        return None
    return _TEGRA.read_text("utf-8", errors="replace").split(", GCID")[0].strip("# \n")


def jetson_release() -> tuple[int, ...] | None:
    """Return the release of Jetson Linux, such as (36, 4, 3); None elsewhere or if it has none."""
    found = re.match(r"R(\d+) .*REVISION: ([\d.]+)", jetson_line() or "")
    return found and tuple(int(n) for n in (found[1], *found[2].strip(".").split(".")))


def jetson_advice(
    release: tuple[int, ...] | None, numpy: str | None, opencv: Mapping[str, str]
) -> list[str]:
    """Return what to change on this Jetson, a line each.

    Args:
        release: See `jetson_release`.
        numpy: Its version, None where it is not installed.
        opencv: Versions of OpenCV's distributions from PyPI; JetPack's is none of them.
    """
    advice = []
    if release is not None and release < OLDEST_RELEASE:
        advice.append("install JetPack 6.1 or later, the first with TensorRT 10.3")
    if not _system_packages_visible():
        advice.append(
            "make the virtual environment again with  python3 -m venv --system-site-packages"
        )
    if opencv:
        advice.append(f"pip uninstall {' '.join(opencv)}  (JetPack's OpenCV has GStreamer)")
    if numpy is not None and int(numpy.partition(".")[0]) >= 2:
        advice.append("pip install 'numpy<2'  (JetPack's OpenCV is built for numpy 1)")
    return advice


def _system_packages_visible() -> bool:
    if sys.prefix == sys.base_prefix:
        return True
    try:
        text = Path(sys.prefix, "pyvenv.cfg").read_text("utf-8")
    except OSError:
        return False
    return re.search(r"(?m)^include-system-site-packages\s*=\s*true\s*$", text) is not None

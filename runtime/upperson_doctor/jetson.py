"""What to change on a Jetson."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from upperson_rt.errors import jetson_line

_OLDEST_RELEASE = (36, 4)
"""Jetson Linux of JetPack 6.1, the first with TensorRT 10.3."""


def jetson_release() -> tuple[int, ...] | None:
    """Return the release of Jetson Linux, such as (36, 4, 3); None elsewhere or if it has none."""
    found = re.match(r"R(\d+) .*REVISION: ([\d.]+)", jetson_line() or "")
    return found and tuple(int(n) for n in (found[1], *found[2].strip(".").split(".")))


def jetson_advice(
    release: tuple[int, ...] | None, numpy: str | None, opencv: Mapping[str, str]
) -> list[str]:
    """Return what to change on this Jetson, a line each."""
    advice = []
    if release is not None and release < _OLDEST_RELEASE:
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

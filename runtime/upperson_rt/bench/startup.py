"""What it takes to start: a fresh process opens a bundle, checks it, and loads both towers.

This is what that process imports: nothing heavy before its clock runs.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from upperson_rt.bench.processes import call_in_fresh_process, resident_bytes

__all__ = ["Startup", "measure_startup"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Startup:
    """A fresh process that is ready to embed pictures and sentences."""

    version: str
    """Version of the backend's library."""
    device: str
    """What really runs."""
    float_type: str | None
    """What a backend says it computes floats in; None if it does not say."""
    start_s: float
    """From the first import until both towers are loaded and their canaries have passed."""
    peak_rss_bytes: int | None
    """Most memory the process ever had resident; None where the system does not tell."""
    canary_min_cosine: float
    """The worst of both towers' canaries."""


def measure_startup(
    bundle: Path, variant: str, backend: str, device: str, threads: int | None
) -> Startup:
    """Start a variant of a bundle on a backend, in a process of its own; see `Bundle.open`.

    Raises:
        BackendError: The backend or device is missing, the graph does not load, or the process
            dies.
        IntegrityError: A file was changed, or it does not compute what it should.
    """
    where = (str(bundle), variant, backend, device, threads)
    return Startup(**call_in_fresh_process(_start, *where))


def _start(
    bundle: str, variant: str, backend: str, device: str, threads: int | None
) -> dict[str, Any]:
    started = time.perf_counter()
    from upperson_rt.bundle import Bundle

    opened = Bundle.open(bundle, variant, backend, device, threads=threads)
    worst = min(check.min_cosine for check in opened.check_canaries())
    running = opened.backend("image")
    return asdict(
        Startup(
            version=running.version,
            device=running.device,
            float_type=getattr(running, "float_type", None),
            start_s=time.perf_counter() - started,
            peak_rss_bytes=resident_bytes("VmHWM"),
            canary_min_cosine=worst,
        )
    )

"""What it takes to start: a fresh process opens a bundle, checks it, and loads both towers."""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from upperson_rt.bench.fresh_process import run_module
from upperson_rt.errors import (
    BackendError,
    InputError,
    IntegrityError,
    UppersonError,
    UsageError,
)

__all__ = ["Contender", "Startup", "measure_startup", "peak_rss_bytes"]

_STATUS = Path("/proc/self/status")
_ERRORS: dict[int, type[UppersonError]] = {
    error.exit_code: error for error in (UsageError, InputError, BackendError, IntegrityError)
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """A variant of a bundle on a backend."""

    bundle: str
    variant: str
    backend: str
    device: str
    threads: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Startup:
    """A fresh process that is ready to embed pictures and sentences."""

    version: str
    """Of the backend's library."""
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


def measure_startup(contender: Contender) -> Startup:
    """Start a contender in a process of its own; whatever it does to itself stays there.

    Raises:
        BackendError: The backend or device is missing, the graph does not load, or the process
            dies.
        IntegrityError: A file was changed, or it does not compute what it should.
        UsageError: There is no such backend.
        InputError: Not a bundle.
    """
    found = run_module(__name__, json.dumps(asdict(contender)))
    if "error" in found:
        raise _ERRORS.get(found["exit_code"], BackendError)(found["error"])
    return Startup(**found)


def _start(contender: Contender) -> Startup:
    started = time.perf_counter()
    from upperson_rt.bundle import Bundle

    bundle = Bundle.open(
        contender.bundle,
        contender.variant,
        contender.backend,
        contender.device,
        threads=contender.threads,
    )
    worst = min(check.min_cosine for check in bundle.check_canaries())
    backend = bundle.backend("image")
    return Startup(
        version=backend.version,
        device=backend.device,
        float_type=getattr(backend, "float_type", None),
        start_s=time.perf_counter() - started,
        peak_rss_bytes=peak_rss_bytes(),
        canary_min_cosine=worst,
    )


def peak_rss_bytes() -> int | None:
    """Return the most memory this process ever had resident; None where nothing tells."""
    # Not getrusage: on Linux its maximum survives exec, and would be the parent's.
    if _STATUS.is_file():
        for line in _STATUS.read_text("ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def _main(task: str) -> None:
    result: dict[str, Any]
    try:
        result = asdict(_start(Contender(**json.loads(task))))
    except UppersonError as error:
        result = {"error": " ".join(str(error).split()), "exit_code": error.exit_code}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    _main(sys.argv[1])

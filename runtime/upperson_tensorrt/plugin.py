"""TensorRT as a backend of the runtime; see `upperson_rt.backends.BackendPlugin`."""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from upperson_rt.cuda_driver import probe_cuda_driver
from upperson_rt.errors import BackendError
from upperson_rt.installed import OPTIONAL, Check, fail_from_error, failed

if TYPE_CHECKING:
    from upperson_tensorrt.backend import TensorRtBackend

__all__ = ["checks", "open", "require_device"]


def open(path: str | os.PathLike[str], device: str, threads: int | None) -> "TensorRtBackend":
    """Load the engine of an ONNX file; ``threads`` has no effect."""
    from upperson_tensorrt.backend import TensorRtBackend

    return TensorRtBackend(path, device)


def require_device(device: str) -> None:
    """Raise BackendError if there is no such GPU."""
    from upperson_tensorrt.bindings import open_gpu

    open_gpu(device)


def checks() -> list[Check]:
    """Return a row for ``upperson-rt doctor``."""
    if find_spec("tensorrt") is None:
        return [Check("tensorrt", "ok", OPTIONAL)]
    return [_check()]


def _check() -> Check:
    """Check TensorRT and its engines; it is started in a process of its own, which it may crash."""
    from upperson_tensorrt.bindings import import_tensorrt, install_hint, start_problem
    from upperson_tensorrt.cache import EngineCache

    try:
        version = import_tensorrt().__version__
    except BackendError as error:
        return fail_from_error("tensorrt", error)
    facts: dict[str, Any] = {"version": version}
    driver = probe_cuda_driver()
    if not driver.devices:
        reason = driver.problem or "the driver finds no GPU"
        return Check(
            "tensorrt",
            "warn",
            f"{version}, which cannot run here: {reason}",
            "install the driver, or run the container with --gpus all",
            facts=facts,
        )
    cache = EngineCache()
    records, problems = cache.records()
    usable = [record for record in records if record.target.tensorrt == version]
    problem = start_problem()
    if problem is not None:
        advice = f"update the driver, or install TensorRT again: {install_hint()}"
        return failed("tensorrt", f"{version} does not start: {problem}", advice)
    variants = ", ".join(sorted({record.variant for record in usable})) or "none"
    found = f"{version}, engines in {cache.folder}: {len(usable)} for this version ({variants})"
    if len(records) > len(usable):
        found += f", {len(records) - len(usable)} for another"
    facts |= {"engines": len(usable), "cache": str(cache.folder)}
    if problems:
        broken = f"{found}; {'; '.join(problems)}"
        return Check("tensorrt", "warn", broken, "compile again", facts=facts)
    advice = "" if usable else "upperson-rt compile BUNDLE  builds them"
    return Check("tensorrt", "ok", found, advice, facts=facts)

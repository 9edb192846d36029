"""ONNX Runtime as a backend of the runtime; see `upperson_rt.backends.BackendPlugin`."""

import os
import re
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING

from upperson_machine.nvidia import probe_cuda_driver
from upperson_rt.checks import OPTIONAL, Check, failed, ok, warning
from upperson_rt.machine import version_of
from upperson_rt.printable import one_line

if TYPE_CHECKING:
    from upperson_onnxruntime.backend import OnnxRuntimeBackend

__all__ = ["checks", "open", "require_device", "runs_any_graph"]

runs_any_graph = True


def open(path: str | os.PathLike[str], device: str, threads: int | None) -> "OnnxRuntimeBackend":
    """Load an ONNX file."""
    from upperson_onnxruntime.backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend(path, device, threads)


def require_device(device: str) -> None:
    """Raise BackendError if ONNX Runtime or the driver does not have that device."""
    from upperson_onnxruntime.backend import require_provider

    require_provider(device)


def checks() -> list[Check]:
    """Return a row for ``upperson-rt doctor``."""
    gpu_build, cpu_build = version_of("onnxruntime-gpu"), version_of("onnxruntime")
    if find_spec("onnxruntime") is None:
        return [ok("onnxruntime", OPTIONAL)]
    if gpu_build and cpu_build:
        both = f"both onnxruntime {cpu_build} and onnxruntime-gpu {gpu_build} are installed; they"
        both += " overwrite each other"
        fix = "pip uninstall onnxruntime onnxruntime-gpu, then install one of them"
        return [warning("onnxruntime", both, fix)]
    return [_installed(gpu_build or cpu_build or "unknown version")]


def _installed(version: str) -> Check:
    try:
        import onnxruntime
    except ImportError as error:
        problem = f"{version} does not import: {one_line(error)}"
        return failed("onnxruntime", problem, "install it again")
    available: list[str] = onnxruntime.get_available_providers()
    providers = [name.removesuffix("ExecutionProvider") for name in available]
    facts = {"version": version, "providers": providers}
    wanted, driver = _wanted_cuda(), probe_cuda_driver().version
    if wanted is not None and driver is not None and int(driver.partition(".")[0]) < wanted:
        detail = f"{version} is for CUDA {wanted}, but the driver only goes up to CUDA {driver}"
        fix = "update the driver, or  pip install 'onnxruntime-gpu[cuda,cudnn]<1.27'"
        return warning("onnxruntime", detail, fix, **facts)
    return ok("onnxruntime", f"{version} with {', '.join(providers)}", **facts)


def _wanted_cuda() -> int | None:
    """Return the version of CUDA that onnxruntime-gpu's own extra asks for, None if it does not."""
    try:
        requires = " ".join(metadata.requires("onnxruntime-gpu") or ())
    except metadata.PackageNotFoundError:
        return None
    found = re.search(r"nvidia-cuda-runtime[\w-]*~=(\d+)", requires)
    return found and int(found[1])

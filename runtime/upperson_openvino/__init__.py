"""OpenVINO as a backend of the runtime; see `upperson_rt.backends.BackendPlugin`."""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from upperson_rt.checks import OPTIONAL, Check, failed, ok
from upperson_rt.machine import version_of
from upperson_rt.printable import one_line

if TYPE_CHECKING:
    from upperson_openvino.backend import OpenVinoBackend

__all__ = ["checks", "open", "require_device", "runs_any_graph"]

runs_any_graph = True


def open(path: str | os.PathLike[str], device: str, threads: int | None) -> "OpenVinoBackend":
    """Load an ONNX file."""
    from upperson_openvino.backend import OpenVinoBackend

    return OpenVinoBackend(path, device, threads)


def require_device(device: str) -> None:
    """Raise BackendError if OpenVINO does not find that device."""
    from upperson_openvino.backend import require_device_of_core

    require_device_of_core(device)


def checks() -> list[Check]:
    """Return a row for ``upperson-rt doctor``."""
    version = version_of("openvino")
    if version is None or find_spec("openvino") is None:
        return [ok("openvino", version or OPTIONAL)]
    from upperson_openvino.backend import import_openvino, same_signal_stack

    try:
        openvino = import_openvino()
        with same_signal_stack():
            devices = [str(name).lower() for name in openvino.Core().available_devices]
    except (ImportError, RuntimeError) as error:
        problem = f"{version} does not start: {one_line(error)}"
        return [failed("openvino", problem, "install it again")]
    found = f"{version} with {', '.join(devices) or 'no device'}"
    return [ok("openvino", found, version=version, devices=devices)]

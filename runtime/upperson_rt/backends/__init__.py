"""Backends: the libraries that run a tower's ONNX file."""

import os
from importlib.util import find_spec

from upperson_rt.backends.base import Backend, BackendName
from upperson_rt.errors import BackendError, UsageError

__all__ = ["Backend", "BackendName", "auto_order", "open_backend"]

BACKEND_NAMES = ("auto", "onnxruntime", "openvino")


def auto_order(device: str = "cpu") -> tuple[str, ...]:
    """Return the backends that ``auto`` considers for a device, the preferred one first."""
    return ("onnxruntime",) if device.startswith("cuda") else ("onnxruntime", "openvino")


def open_backend(
    path: str | os.PathLike[str],
    backend: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
) -> Backend:
    """Load an ONNX file in a backend, and make sure that it runs where it was asked to.

    Args:
        path: The ONNX file.
        backend: ``onnxruntime``, ``openvino``, or ``auto``: the first of `auto_order` that is
            installed. A backend that is installed but fails is an error; nothing falls back.
        device: ``cpu``, ``cuda``, ``cuda:N`` (onnxruntime), ``gpu`` or ``npu`` (openvino).
        threads: CPU threads; None lets the library choose.

    Raises:
        UsageError: There is no such backend, or the number of threads is below 1.
        BackendError: The library or device is missing, or the graph does not load.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    device = device.lower()
    match _first_installed(device) if backend == "auto" else backend:
        case "onnxruntime":
            from upperson_rt.backends.onnxruntime import OnnxRuntimeBackend

            return OnnxRuntimeBackend(path, device, threads)
        case "openvino":
            from upperson_rt.backends.openvino import OpenVinoBackend

            return OpenVinoBackend(path, device, threads)
        case unknown:
            raise UsageError(f"no backend '{unknown}': use one of {', '.join(BACKEND_NAMES)}")


def _first_installed(device: str) -> str:
    order = auto_order(device)
    for name in order:
        if find_spec(name) is not None:
            return name
    extra = "gpu" if device.startswith("cuda") else "cpu"
    raise BackendError(
        f"no inference backend for the device '{device}' is installed (looked for "
        f"{', '.join(order)}): run  pip install 'upperson-rt[{extra}]'"
    )

"""Backends: the libraries that run a tower's ONNX file."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from upperson_rt.arguments import check_count, check_text
from upperson_rt.errors import BackendError, UsageError, install_command
from upperson_rt.extensions import extension_names, load_extension, missing_files
from upperson_rt.printable import safe_repr
from upperson_rt.towers import Backend

if TYPE_CHECKING:
    from upperson_rt.checks import Check

__all__ = [
    "BackendPlugin", "Choice", "auto_order", "installed_backends", "open_backend", "require_device",
]  # fmt: skip

_MOST_THREADS = 1024


class BackendPlugin(Protocol):
    """What an entry point of ``upperson.backends`` names: a module or an object with these."""

    runs_any_graph: bool
    """False where a graph has to be compiled before, as for TensorRT; `upperson-rt doctor` then
    leaves the trial of a small graph out, as for plug-ins that do not say."""

    def open(self, path: str | os.PathLike[str], device: str, threads: int | None) -> Backend:
        """Load an ONNX file; see `open_backend`."""

    def require_device(self, device: str) -> None:
        """Raise BackendError if the device, or the library for it, is missing."""

    def checks(self) -> "list[Check]":
        """Return rows for ``upperson-rt doctor``."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Why a backend runs a tower."""

    why: str
    """In one line."""


def auto_order(device: str = "cpu") -> tuple[str, ...]:
    """Return the backends that ``auto`` considers for a device, see `upperson_autotune`."""
    on_gpu, elsewhere = ("tensorrt", "onnxruntime"), ("onnxruntime", "openvino")
    return on_gpu if device.startswith("cuda") else elsewhere


def open_backend(
    path: str | os.PathLike[str],
    backend: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
) -> Backend:
    """Load an ONNX file in a backend, and make sure that it runs on that device.

    Args:
        path: The ONNX file.
        backend: ``onnxruntime``, ``openvino``, ``tensorrt``, or ``auto``: the first of
            `auto_order` that is installed; a bundle chooses better, see `Bundle.open`. A backend
            that is installed but fails is an error; nothing falls back. ``tensorrt`` runs engines
            that ``upperson-rt compile`` has built.
        device: ``cpu``, ``cuda``, ``cuda:N`` (tensorrt, onnxruntime), ``gpu`` or ``npu``
            (openvino).
        threads: CPU threads; None lets the library choose. Of no use to ``tensorrt``.

    Raises:
        UsageError: There is no such backend, or threads is not from 1 to 1024.
        BackendError: The library or device is missing, or the graph does not load.
        IntegrityError: A TensorRT engine was changed since it was built.
    """
    if threads is not None:
        threads = check_count(threads, "threads", most=_MOST_THREADS)
    device = check_text(device, "device", UsageError).lower()
    check_text(backend, "backend", UsageError)
    return _plugin(backend, device).open(path, device, threads)


def require_device(backend: str, device: str) -> None:
    """Make sure that a device of `open_backend` is there, before anything is loaded for it."""
    device = device.lower()
    if device == "cpu":
        return
    _plugin(backend, device).require_device(device)


def _plugin(backend: str, device: str) -> BackendPlugin:
    name = installed_backends(device)[0] if backend == "auto" else backend
    names = extension_names("backends")
    if name not in names:
        message = f"no backend {safe_repr(name)}: use one of {', '.join(('auto', *names))}"
        raise UsageError(message, code="backend_unknown")
    plugin: BackendPlugin = load_extension("backends", name)
    return plugin


def _is_installed(name: str) -> bool:
    return find_spec(name) is not None and name in extension_names("backends")


def installed_backends(device: str) -> tuple[str, ...]:
    """Return those of `auto_order` that are installed; there is at least one."""
    order = auto_order(device)
    if found := tuple(name for name in order if _is_installed(name)):
        return found
    if not extension_names("backends"):  # This distribution has some, so its files are missing.
        raise missing_files("backend")
    extra = "gpu" if device.startswith("cuda") else "cpu"
    message = f"no inference backend for the device {safe_repr(device)} is installed (looked for "
    message += f"{', '.join(order)}): run  {install_command(extra)}"
    raise BackendError(message, code="no_backend", device=device, extra=extra)

"""ONNX Runtime on a CPU or an NVIDIA GPU."""

import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import partial
from typing import Any

from numpy.typing import NDArray

from upperson_machine.int8 import EXACT, INT8_SUMS, int8_sums_saturate
from upperson_machine.nvidia import probe_cuda_driver
from upperson_rt.errors import BackendError, install_command, missing_extra
from upperson_rt.printable import one_line, safe_repr


class OnnxRuntimeBackend:
    """An ONNX Runtime session on exactly one device.

    Left to itself, ONNX Runtime goes on with the CPU when a GPU does not start, and again when it
    fails later on, with a line on stdout. Both are off here: they end in a BackendError.

    Where a CPU would add int8 products in saturating 16 bits, graphs that are not made for it are
    computed in float: see `upperson_machine.int8`.
    """

    name = "onnxruntime"
    max_batch: int | None = None

    def __init__(
        self, path: str | os.PathLike[str], device: str = "cpu", threads: int | None = None
    ) -> None:
        ort = _import_onnxruntime(device)
        from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

        self.device = device
        self.version: str = ort.__version__
        own = (
            "EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile",
            "NotImplemented", "RuntimeException",
        )  # fmt: skip
        self._errors = (*(getattr(ort_state, name) for name in own), RuntimeError, ValueError)
        _require_provider(ort, device)
        provider, provider_options = _provider(device)
        numbers = [int(n) if n.isdigit() else 0 for n in ort.__version__.split(".")[:2]]
        if "use_tf32" in provider_options and numbers < [1, 18]:
            message = f"onnxruntime {self.version} is too old for a GPU, it computes float32 in "
            message += "TF32: 1.18 or later is needed"
            raise BackendError(message, code="onnxruntime_too_old", version=self.version)
        if provider == "CUDAExecutionProvider" and hasattr(ort, "preload_dlls"):  # From 1.21 on.
            with redirect_stdout(sys.stderr):  # It prints what it does not find.
                ort.preload_dlls()  # From NVIDIA's Python packages, where the linker does not look.
        options = session_options(ort, threads)
        session = partial(
            ort.InferenceSession,
            os.fspath(path),
            providers=[(provider, provider_options)],
            enable_fallback=0,
        )
        saturates = device == "cpu" and int8_sums_saturate()
        if saturates:  # Then in float, as the Q/DQ pairs of the graph say.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            self._session = session(options)
            metadata = self._session.get_modelmeta().custom_metadata_map
            if saturates and metadata.get(INT8_SUMS) == EXACT:
                fused = session_options(ort, threads)  # An entry that changes is a warning.
                fused.add_session_config_entry("session.disable_quant_qdq", "0")
                self._session = session(fused)
        except self._errors as error:
            name = os.fspath(path)
            message = f"onnxruntime {self.version} cannot load {name}: {one_line(error)}"
            raise BackendError(message, code="graph_not_loaded", path=name) from error
        # ONNX Runtime falls back to the CPU when a provider fails to start, without an error.
        running = self._session.get_providers()[0]
        if running != provider:
            message = f"device {safe_repr(device)} did not start: ONNX Runtime fell back from "
            message += f"{provider} to {running}. Check the driver and CUDA libraries with  "
            message += "upperson-rt doctor"
            raise BackendError(message, code="device_not_started", device=device)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph; see `Backend.run`."""
        names = [output.name for output in self._session.get_outputs()]
        try:
            return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))
        except self._errors as error:
            message = f"onnxruntime {self.version} failed: {one_line(error)}"
            raise BackendError(message, code="run_failed") from error


def require_provider(device: str) -> None:
    """Make sure that ONNX Runtime and the driver have a device."""
    _require_provider(_import_onnxruntime(device), device)
    kind, _, index = device.partition(":")
    if kind == "cuda":
        driver = probe_cuda_driver()
        if int(index or 0) >= len(driver.devices):
            there = ", ".join(driver.devices) or driver.problem or "no GPU"
            message = f"there is no device {safe_repr(device)} here, only {there}: choose another "
            message += "device, or see  upperson-rt doctor"
            raise BackendError(message, code="device_missing", device=device)


def _import_onnxruntime(device: str) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        extra = "gpu" if device.startswith("cuda") else "cpu"
        raise missing_extra("onnxruntime", extra, "the backend 'onnxruntime'") from error
    return onnxruntime


def _require_provider(ort: Any, device: str) -> None:
    provider, _ = _provider(device)
    available = ort.get_available_providers()
    if provider not in available:
        message = f"device {safe_repr(device)} needs ONNX Runtime's {provider}, but onnxruntime "
        message += f"{ort.__version__} here has only {', '.join(available)}: {cuda_advice()}, or "
        message += "choose the device 'cpu'"
        raise BackendError(message, code="provider_missing", device=device)


def session_options(ort: Any, threads: int | None) -> Any:
    """Return ``SessionOptions`` whose CPU threads sleep while they wait."""
    options = ort.SessionOptions()
    # What matters comes back as an exception; its own log shows names of a model as they are.
    options.log_severity_level = 4
    for pool in ("intra_op", "inter_op"):
        options.add_session_config_entry(f"session.{pool}.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def cuda_advice() -> str:
    """Return what brings an ONNX Runtime with CUDA, which takes the place of the one without."""
    command = install_command("gpu")
    return command if "[cpu]" in command else f"pip uninstall onnxruntime, then  {command}"


def _provider(device: str) -> tuple[str, dict[str, str]]:
    kind, _, index = device.partition(":")
    if device == "cpu":
        return "CPUExecutionProvider", {}
    if kind == "cuda" and (not index or index.isdigit()):
        # Else products of float32 are computed with 10 bits of mantissa.
        return "CUDAExecutionProvider", {"device_id": index or "0", "use_tf32": "0"}
    message = (
        f"the backend 'onnxruntime' has no device {safe_repr(device)}: use cpu, cuda or cuda:N"
    )
    raise BackendError(message, code="device_unknown", device=device)

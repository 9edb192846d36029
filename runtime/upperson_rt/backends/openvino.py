"""OpenVINO on an Intel or ARM CPU, or an Intel GPU or NPU."""

import os
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import BackendError, missing_extra

__all__ = ["OpenVinoBackend"]


class OpenVinoBackend:
    """A compiled OpenVINO model on exactly one device, computing in float32 or int8."""

    name = "openvino"

    def __init__(
        self, path: str | os.PathLike[str], device: str = "cpu", threads: int | None = None
    ) -> None:
        """Load and compile a graph.

        Args:
            path: The ONNX file.
            device: ``cpu``, ``gpu``, ``gpu.1`` or ``npu``.
            threads: CPU threads; None lets the library choose.

        Raises:
            BackendError: The library or device is missing, or the graph does not load.
        """
        try:
            import openvino
        except ImportError as error:
            raise missing_extra("openvino", "cpu", "the backend 'openvino'") from error
        self.device = device
        self.version: str = openvino.__version__.partition("-")[0]
        core = openvino.Core()
        available = [name.lower() for name in core.available_devices]
        if device not in (*available, *(name.partition(".")[0] for name in available)):
            raise BackendError(
                f"OpenVINO {self.version} finds no device '{device}' here, only "
                f"{', '.join(available) or 'none'}"
            )
        # Without the hint a CPU with bf16 units quietly computes in bf16, and embeddings drift.
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        try:
            self._compiled = core.compile_model(os.fspath(path), device.upper(), config)
            running = [name.lower() for name in self._compiled.get_property("EXECUTION_DEVICES")]
        except RuntimeError as error:
            raise BackendError(
                f"OpenVINO {self.version} cannot load {os.fspath(path)}: {error}"
            ) from error
        if not all(name.startswith(device) for name in running):
            raise BackendError(
                f"device '{device}' did not start: OpenVINO runs on {', '.join(running)}"
            )
        self._names = [output.get_any_name() for output in self._compiled.outputs]
        self._request = self._compiled.create_infer_request()
        self._lock = threading.Lock()  # A request holds one set of tensors.

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph; see `Backend.run`."""
        with self._lock:
            try:
                self._request.infer({key: np.ascontiguousarray(a) for key, a in inputs.items()})
            except (RuntimeError, ValueError, TypeError) as error:
                raise BackendError(f"OpenVINO {self.version} failed: {error}") from error
            return {name: np.array(self._request.get_tensor(name).data) for name in self._names}

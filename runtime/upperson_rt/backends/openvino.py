"""OpenVINO on an Intel or ARM CPU, or an Intel GPU or NPU."""

import os
import threading
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.backends.signal_stack import same_signal_stack
from upperson_rt.errors import BackendError, missing_extra

__all__ = ["FloatType", "OpenVinoBackend"]

FloatType: TypeAlias = Literal["f32", "bf16"]


class OpenVinoBackend:
    """A compiled OpenVINO model on exactly one device.

    A float graph computes in float32. What an int8 graph leaves in float runs in bfloat16 where the
    CPU has it, which is faster and adds an error of the order of int8's own.
    """

    name = "openvino"
    max_batch: int | None = None

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: str = "cpu",
        threads: int | None = None,
        float_type: FloatType | None = None,
    ) -> None:
        """Load and compile a graph.

        Args:
            path: The ONNX file.
            device: ``cpu``, ``gpu``, ``gpu.1`` or ``npu``.
            threads: CPU threads; None lets the library choose.
            float_type: For benchmarks: what floats are computed in, instead of the rule above.

        Raises:
            BackendError: The library, the device or the float type is missing, or the graph does
                not load.
        """
        try:
            import openvino
        except ImportError as error:
            raise missing_extra("openvino", "cpu", "the backend 'openvino'") from error
        with same_signal_stack():
            self._load(openvino, path, device, threads, float_type)
        self._lock = threading.Lock()  # A request holds one set of tensors.

    def _load(
        self,
        openvino: Any,
        path: str | os.PathLike[str],
        device: str,
        threads: int | None,
        float_type: FloatType | None,
    ) -> None:
        self.device = device
        self.version: str = openvino.__version__.partition("-")[0]
        core = openvino.Core()
        available = [name.lower() for name in core.available_devices]
        if device not in (*available, *(name.partition(".")[0] for name in available)):
            raise BackendError(
                f"OpenVINO {self.version} finds no device '{device}' here, only "
                f"{', '.join(available) or 'none'}"
            )
        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        try:
            model = core.read_model(os.fspath(path))
            if float_type is None:
                float_type = "bf16" if _is_int8(model) and _has_bf16(core, device) else "f32"
            # Without the hint a CPU with bf16 units quietly computes all graphs in bf16, and
            # embeddings of float32 graphs drift.
            config["INFERENCE_PRECISION_HINT"] = float_type
            self._compiled = core.compile_model(model, device.upper(), config)
            running = [name.lower() for name in self._compiled.get_property("EXECUTION_DEVICES")]
            hint = self._compiled.get_property("INFERENCE_PRECISION_HINT")
        except RuntimeError as error:
            raise BackendError(
                f"OpenVINO {self.version} cannot load {os.fspath(path)}: {error}"
            ) from error
        if not all(name.startswith(device) for name in running):
            raise BackendError(
                f"device '{device}' did not start: OpenVINO runs on {', '.join(running)}"
            )
        self.float_type: str = hint.get_type_name()
        """What floats are really computed in, such as ``f32`` or ``bf16``."""
        if self.float_type != float_type:
            raise BackendError(
                f"OpenVINO {self.version} on '{device}' computes in {self.float_type}, not in the "
                f"{float_type} asked for"
            )
        self._names = [output.get_any_name() for output in self._compiled.outputs]
        self._request = self._compiled.create_infer_request()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph; see `Backend.run`."""
        with self._lock:
            try:
                self._request.infer({key: np.ascontiguousarray(a) for key, a in inputs.items()})
            except (RuntimeError, ValueError, TypeError) as error:
                raise BackendError(f"OpenVINO {self.version} failed: {error}") from error
            return {name: np.array(self._request.get_tensor(name).data) for name in self._names}


def _is_int8(model: Any) -> bool:
    """Whether the graph has quantization in it."""
    return any(node.get_type_name() == "FakeQuantize" for node in model.get_ops())


def _has_bf16(core: Any, device: str) -> bool:
    if device != "cpu":
        return False
    return "BF16" in core.get_property(device.upper(), "OPTIMIZATION_CAPABILITIES")

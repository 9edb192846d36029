"""OpenVINO on an Intel or ARM CPU, or an Intel GPU or NPU."""

import ctypes
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_machine.int8 import PAIR_LIMIT, int8_sums_saturate, largest_pair
from upperson_rt.errors import BackendError, missing_extra
from upperson_rt.machine import processor
from upperson_rt.printable import one_line, safe_repr

_TELEMETRY = "openvino_telemetry"

PIECE = 8
"""Pictures that a CPU computes at once, in a graph compiled for just that many. For any other
number there is one that takes them all, and takes a tenth to a quarter longer per picture."""

_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Values of ONEDNN_MAX_CPU_ISA, which bounds the kernels, that leave none for bfloat16."""

_FEW_THREADS = 16
"""More than these might not all find work in a piece; that has not been measured."""


class OpenVinoBackend:
    """A compiled OpenVINO model on exactly one device.

    A float graph computes in float32. What an int8 graph leaves in float runs in bfloat16 where the
    CPU has it, which is faster and adds an error of the order of int8's own. On a CPU pictures run
    in pieces of ``PIECE``; the graph for other numbers rounds a little differently in bfloat16.
    """

    name = "openvino"

    def __init__(
        self, path: str | os.PathLike[str], device: str = "cpu", threads: int | None = None
    ) -> None:
        openvino = _openvino()
        with same_signal_stack():
            self._load(openvino, path, device, threads)
        self._lock = threading.Lock()  # A request holds one set of tensors.

    def _load(
        self, openvino: Any, path: str | os.PathLike[str], device: str, threads: int | None
    ) -> None:
        self.device = device
        self.version: str = openvino.__version__.partition("-")[0]
        core = openvino.Core()
        _require_device(core, device, self.version)
        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        try:
            model = core.read_model(os.fspath(path))
            self.inputs: dict[str, tuple[tuple[int | None, ...], np.dtype[Any]]] = {
                entry.get_any_name(): (
                    tuple(None if n.is_dynamic else n.get_length() for n in entry.partial_shape),
                    np.dtype(entry.get_element_type().to_dtype()),
                )
                for entry in model.inputs
            }
            """Shape and type of every input; None stands for a size that may change."""
            _bound_places(model)
            # Compiling gives an output the names of all that was folded into it.
            self._names = [_name_of(output) for output in model.outputs]
            if device == "cpu" and int8_sums_saturate() and _may_saturate(model):
                message = (
                    f"OpenVINO would compute {os.fspath(path)} inexactly: this processor has no "
                    "VNNI and adds int8 products in saturating 16 bits. Choose the backend "
                    "onnxruntime or another variant, or export the bundle again, which makes int8 "
                    "that is exact on every CPU"
                )
                raise BackendError(message, code="sums_saturate", path=os.fspath(path))
            float_type = "bf16" if _is_int8(model) and _has_bf16(core, device) else "f32"
            # Without the hint a CPU with bf16 units quietly computes all graphs in bf16, and
            # embeddings of float32 graphs drift.
            config["INFERENCE_PRECISION_HINT"] = float_type
            compiled = core.compile_model(model, device.upper(), config)
            running = [name.lower() for name in compiled.get_property("EXECUTION_DEVICES")]
            hint = compiled.get_property("INFERENCE_PRECISION_HINT")
            self._any = compiled.create_infer_request()
            self._piece: Any = None
            if _runs_in_pieces(device, compiled):
                model.reshape([PIECE, *list(model.input().partial_shape)[1:]])
                piece = core.compile_model(model, device.upper(), config)
                self._piece = piece.create_infer_request()
        except (RuntimeError, UnicodeDecodeError) as error:  # It may quote what is no text.
            name = os.fspath(path)
            message = f"OpenVINO {self.version} cannot load {name}: {one_line(error)}"
            raise BackendError(message, code="graph_not_loaded", path=name) from error
        if not all(name.startswith(device) for name in running):
            found = ", ".join(running)
            message = f"device {safe_repr(device)} did not start: OpenVINO runs on {found}"
            raise BackendError(message, code="device_not_started", device=device)
        self.float_type: str = hint.get_type_name()
        """What floats are really computed in, such as ``f32`` or ``bf16``."""
        if self.float_type != float_type:
            message = f"OpenVINO {self.version} on '{device}' computes in {self.float_type}, not in"
            message += f" the {float_type} asked for"
            raise BackendError(message, code="float_type_differs", found=self.float_type)
        self._input_count = len(compiled.inputs)
        self._dtypes = {  # An input may have several names.
            name: np.dtype(entry.get_element_type().to_dtype())
            for entry in compiled.inputs
            for name in entry.get_names()
        }

    @property
    def max_batch(self) -> int | None:
        """See `Backend.max_batch`."""
        return None if self._piece is None else PIECE

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph; see `Backend.run`."""
        dtypes = {name: array.dtype for name, array in inputs.items()}
        if len(dtypes) != self._input_count or not dtypes.items() <= self._dtypes.items():
            expected, found = (
                ", ".join(f"{name} {dtype}" for name, dtype in each.items()) or "nothing"
                for each in (self._dtypes, dtypes)
            )
            message = f"OpenVINO {self.version} failed: the graph takes {expected}, found {found}"
            raise BackendError(message, code="run_failed")
        full = self._piece is not None and all(len(array) == PIECE for array in inputs.values())
        request = self._piece if full else self._any
        with self._lock:
            try:
                # On one thread `infer` swallows errors, and its output is that of the call before.
                request.start_async({key: np.ascontiguousarray(a) for key, a in inputs.items()})
                request.wait()
            except (RuntimeError, ValueError, TypeError) as error:
                message = f"OpenVINO {self.version} failed: {one_line(error)}"
                raise BackendError(message, code="run_failed") from error
            return {name: np.array(request.get_tensor(name).data) for name in self._names}


def require_device_of_core(device: str) -> None:
    """Make sure that OpenVINO finds a device."""
    openvino = _openvino()
    with same_signal_stack():
        _require_device(openvino.Core(), device, openvino.__version__.partition("-")[0])


def import_openvino() -> Any:
    """Import OpenVINO without openvino_telemetry, which reports every import to Google Analytics.

    Its forked process may hang forever. Raises ImportError where OpenVINO is not installed.
    """
    is_known = _TELEMETRY in sys.modules
    if not is_known:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # It cannot be imported now.
    try:
        import openvino
    finally:
        if not is_known:
            sys.modules.pop(_TELEMETRY, None)
    return openvino


def _openvino() -> Any:
    try:
        return import_openvino()
    except ImportError as error:
        raise missing_extra("openvino", "cpu", "the backend 'openvino'") from error


def _require_device(core: Any, device: str, version: str) -> None:
    available = [name.lower() for name in core.available_devices]
    if device not in (*available, *(name.partition(".")[0] for name in available)):
        found = ", ".join(available) or "none"
        message = f"OpenVINO {version} finds no device {safe_repr(device)} here, only {found}"
        raise BackendError(message, code="device_missing", device=device)


def _name_of(output: Any) -> str:
    """Return the name that the file gives an output; TensorFlow's operators have names, too."""
    own: str = output.node.get_friendly_name()
    name: str = own if own in output.get_names() else output.get_any_name()
    return name


def _runs_in_pieces(device: str, compiled: Any) -> bool:
    """Whether the batch is all that may change: captions also differ in length."""
    if device != "cpu" or compiled.get_property("INFERENCE_NUM_THREADS") > _FEW_THREADS:
        return False
    shapes = [list(entry.get_partial_shape()) for entry in compiled.inputs]
    return [[size.is_dynamic for size in shape] for shape in shapes] == [
        [True, False, False, False]
    ]


def _bound_places(model: Any) -> None:
    """Replace GatherND, which reads at any index, by Gather, which finds zeros beyond the tensor.

    Text towers of before 27 November 2026 have one. Only an index of one number is understood.
    """
    nodes = [node for node in model.get_ops() if node.get_type_name() == "GatherND"]
    if not nodes:
        return
    try:
        from openvino import opset8
    except ImportError:  # Until 2024.6.
        from openvino.runtime import opset8
    for node in nodes:
        data, places = node.input_value(0), opset8.squeeze(node.input_value(1), np.int64(-1))
        axis = int(node.get_attributes()["batch_dims"])
        bounded = opset8.gather(data, places, np.int64(axis), batch_dims=axis)
        node.output(0).replace(bounded.output(0))


def _is_int8(model: Any) -> bool:
    return any(node.get_type_name() == "FakeQuantize" for node in model.get_ops())


def _may_saturate(model: Any) -> bool:
    """Whether two neighbouring weights of an int8 matrix [in, out] exceed `PAIR_LIMIT`."""
    weights = (
        node.get_data()
        for node in model.get_ops()
        if node.get_type_name() == "Constant"
        and node.get_element_type().get_type_name() == "i8"
        and len(node.get_output_shape(0)) == 2
    )
    return any(largest_pair(weight).max() > PAIR_LIMIT for weight in weights)


def _has_bf16(core: Any, device: str) -> bool:
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _WITHOUT_BF16:
        return False  # The plugin says what the processor has, and then finds no kernel.
    if device != "cpu" or not processor().has_bf16:  # OpenVINO emulates it on AVX-512.
        return False
    return "BF16" in core.get_property(device.upper(), "OPTIMIZATION_CAPABILITIES")


class _Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


_ON_STACK = 1


@contextmanager
def same_signal_stack() -> Iterator[None]:
    """Restore this thread's alternate signal stack at the end; does nothing but on Linux.

    OpenVINO gives a thread that loads its CPU plugin a stack for signals and frees it with the
    plugin. If two plugins go in another order, a freed stack stays registered and the next signal
    crashes the process (seen with OpenVINO 2026.4).
    """
    if sys.platform != "linux":
        yield
        return
    libc = ctypes.CDLL(None)
    before = _Stack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        if not before.flags & _ON_STACK:
            libc.sigaltstack(ctypes.byref(before), None)

"""Runs an engine: one input, one output, any number of rows."""

import logging
import math
import threading
import weakref
from collections import Counter
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import BackendError
from upperson_rt.tensorrt.bindings import trt_log
from upperson_rt.tensorrt.cuda import Cuda, StagedBuffer

__all__ = ["EngineSession"]

_DTYPES = {"UINT8": np.uint8, "INT32": np.int32, "FLOAT": np.float32}
"""The types that go in and out of towers, by their name in TensorRT."""

_RUNS_BEFORE_CAPTURE = 3
_MOST_GRAPHS = 4
"""Each graph keeps an execution context, and with it scratch memory, for itself."""


class EngineSession:
    """A loaded engine with its buffers. Safe to call from several threads, which take turns."""

    def __init__(self, trt: ModuleType, cuda: Cuda, plan: bytes, cuda_graphs: bool = False) -> None:
        """Load an engine.

        Args:
            trt: The bindings.
            cuda: The GPU that the engine was built on.
            plan: The serialized engine. Loading runs code in it: only from a trusted place.
            cuda_graphs: Record a shape that comes up repeatedly as a CUDA graph, which saves the
                time of launching its kernels one by one. Off by default: tested against a
                stand-in for TensorRT only.

        Raises:
            BackendError: TensorRT refuses the engine, or memory is short.
        """
        self._trt, self._cuda = trt, cuda
        buffers: list[StagedBuffer] = []
        streams: list[int] = []
        self._graph_handles: list[int] = []
        release = weakref.finalize(self, cuda.release, buffers, streams, self._graph_handles)
        release.atexit = False  # When the process ends, the driver cleans up by itself.
        self._cuda_graphs = cuda_graphs
        self._graphs: dict[tuple[int, ...], tuple[int, Any]] = {}
        self._runs: Counter[tuple[int, ...]] = Counter()
        self._lock = threading.Lock()  # One context, one pair of buffers.
        with cuda.current():
            self._runtime, self._engine = self._load(plan)
            self._context = self._new_context()
            self.input_name, self.output_name = self._tensor_names()
            self._input_dtype = self._dtype(self.input_name)
            self._output_dtype = self._dtype(self.output_name)
            low, _, high = self._engine.get_tensor_profile_shape(self.input_name, 0)
            self.min_shape, self.max_shape = tuple(low), tuple(high)
            """Smallest and largest input that runs in one go; axis 0 counts rows."""
            self._set_shape(self._context, self.max_shape)
            largest_output = tuple(self._context.get_tensor_shape(self.output_name))
            if largest_output[0] != self.max_shape[0] or min(largest_output) < 1:
                raise BackendError(
                    f"the engine is not a tower: {self.max_shape} in gives {largest_output} out"
                )
            self._row_shape = largest_output[1:]
            for dtype, shape in (
                (self._input_dtype, self.max_shape),
                (self._output_dtype, largest_output),
            ):
                buffers.append(cuda.staged_buffer(dtype.itemsize * math.prod(shape)))
            self._input, self._output = buffers
            self._stream = cuda.new_stream()
            streams.append(self._stream)
            self._bind(self._context)

    def run(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Run the engine on rows of its input; more than fit at once go in several pieces.

        Args:
            rows: (N, ...) of the input's dtype, with sizes that the engine was built for.

        Returns:
            (N, ...) of the output's dtype; it belongs to the caller.

        Raises:
            BackendError: Another dtype or shape, or TensorRT or CUDA fails.
        """
        self._check(rows)
        found = np.empty((len(rows), *self._row_shape), self._output_dtype)
        with self._lock, self._cuda.current():
            for start in range(0, len(rows), self.max_shape[0]):
                piece = slice(start, start + self.max_shape[0])
                found[piece] = self._run_piece(rows[piece])
        return found

    def _run_piece(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Return a view of the staging buffer."""
        missing = self.min_shape[0] - len(rows)
        if missing > 0:  # An engine from elsewhere may have a smallest batch: fill it up.
            rows = np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)])
        self._input.host[: rows.nbytes].view(self._input_dtype).reshape(rows.shape)[...] = rows
        shape = (len(rows), *self._row_shape)
        nbytes = self._output_dtype.itemsize * math.prod(shape)
        graph = self._graph(rows.shape) if self._cuda_graphs else None
        self._cuda.upload(self._input, rows.nbytes, self._stream)
        if graph is not None:
            self._cuda.launch(graph, self._stream)
        else:
            self._set_shape(self._context, rows.shape)
            self._execute(self._context)
        self._cuda.download(self._output, nbytes, self._stream)
        self._cuda.synchronize(self._stream)
        found = self._output.host[:nbytes].view(self._output_dtype).reshape(shape)
        return found[: len(rows) - max(missing, 0)]

    def _graph(self, shape: tuple[int, ...]) -> int | None:
        """Return the graph of a shape, capturing it once the shape has proved to come back."""
        if shape in self._graphs:
            return self._graphs[shape][0]
        self._runs[shape] += 1
        if self._runs[shape] <= _RUNS_BEFORE_CAPTURE or len(self._graphs) >= _MOST_GRAPHS:
            return None
        # A graph is bound to the state of its context, so that context serves no other shape.
        context = self._new_context()
        self._bind(context)
        self._set_shape(context, shape)
        # The first run after a change of shape does work of its own that must not be captured.
        self._execute(context)
        self._cuda.synchronize(self._stream)
        try:
            graph = self._cuda.capture(self._stream, lambda: self._execute(context))
        except BackendError as error:
            logging.getLogger("upperson_rt.tensorrt").warning(
                "no CUDA graphs from here on, the engine cannot be captured: %s", error
            )
            self._cuda_graphs = False
            return None
        self._graphs[shape] = (graph, context)
        self._graph_handles.append(graph)
        return graph

    def _check(self, rows: NDArray[Any]) -> None:
        low, high = self.min_shape[1:], self.max_shape[1:]
        fits = rows.ndim == len(self.max_shape) and all(
            a <= size <= b for a, size, b in zip(low, rows.shape[1:], high, strict=True)
        )
        if rows.dtype != self._input_dtype or not fits:
            ranges = ", ".join(
                str(b) if a == b else f"{a} to {b}" for a, b in zip(low, high, strict=True)
            )
            raise BackendError(
                f"TensorRT failed: the engine's input '{self.input_name}' is "
                f"{self._input_dtype} (N, {ranges}), found {rows.dtype} {rows.shape}"
            )

    def _load(self, plan: bytes) -> tuple[Any, Any]:
        logger, log = trt_log(self._trt)
        log.take_errors()
        try:
            runtime = self._trt.Runtime(logger)
        except (TypeError, RuntimeError) as error:  # How pybind11 reports a null pointer.
            raise self._error("does not start") from error
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self._error("refuses the engine", "compile it again with  upperson-rt compile")
        return runtime, engine

    def _tensor_names(self) -> tuple[str, str]:
        engine, mode = self._engine, self._trt.TensorIOMode
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == mode.INPUT]
        outputs = [name for name in names if name not in inputs]
        if len(inputs) != 1 or len(outputs) != 1:
            raise BackendError(
                f"the engine is not a tower: expected one input and one output, found {inputs} "
                f"and {outputs}"
            )
        return inputs[0], outputs[0]

    def _new_context(self) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise self._error(
                "cannot make an execution context", "close other programs if memory is short"
            )
        return context

    def _bind(self, context: Any) -> None:
        for name, buffer in ((self.input_name, self._input), (self.output_name, self._output)):
            if not context.set_tensor_address(name, buffer.device_address):
                raise self._error(f"refuses the address of '{name}'")

    def _set_shape(self, context: Any, shape: tuple[int, ...]) -> None:
        if not context.set_input_shape(self.input_name, shape):
            raise self._error(f"refuses the shape {shape}")

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream):
            raise self._error("failed")

    def _dtype(self, name: str) -> np.dtype[Any]:
        dtype = self._engine.get_tensor_dtype(name).name
        if dtype not in _DTYPES:
            raise BackendError(
                f"the engine's tensor '{name}' is {dtype}, expected one of {', '.join(_DTYPES)}: "
                "export the bundle again"
            )
        return np.dtype(_DTYPES[dtype])

    def _error(self, problem: str, advice: str = "see  upperson-rt doctor") -> BackendError:
        reason = trt_log(self._trt)[1].take_errors()
        return BackendError(f"TensorRT {self._trt.__version__} {problem}: {reason}; {advice}")

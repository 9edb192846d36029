"""Runs an engine: one input, one output, any number of rows."""

import math
import queue
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import BackendError
from upperson_rt.printable import get_logger
from upperson_tensorrt.bindings import trt_log
from upperson_tensorrt.cuda import Cuda, StagedBuffer

_DTYPES = {"UINT8": np.uint8, "INT32": np.int32, "FLOAT": np.float32}
"""The types that go in and out of towers, by their name in TensorRT."""

_MOST_LANES = 2
_RUNS_BEFORE_CAPTURE = 3
_MOST_GRAPHS = 4
"""Each graph keeps an execution context, and with it scratch memory, for itself."""


class _Lane:
    """What one batch needs on its way through the GPU; batches in two lanes overlap."""

    def __init__(self, stream: int, buffers: tuple[StagedBuffer, StagedBuffer], context: Any):
        self.stream = stream
        self.input, self.output = buffers
        self.context = context
        self.graphs: dict[tuple[int, ...], tuple[int, Any]] = {}
        """By shape of the input: the graph, and the context whose state it is bound to."""
        self.runs: Counter[tuple[int, ...]] = Counter()


class EngineSession:
    """A loaded engine. Safe to call from several threads.

    While one batch runs on its stream, the next is copied: a piece of a large batch, or another
    thread's. Where memory for that second lane is missing, batches take turns.
    """

    def __init__(self, trt: ModuleType, cuda: Cuda, plan: bytes, cuda_graphs: bool = False) -> None:
        """Load an engine, which runs code in it: only from a trusted place.

        With ``cuda_graphs`` a shape that comes up repeatedly is recorded as a CUDA graph, which
        saves launching its kernels one by one. Each graph is first compared with an ordinary run,
        bit by bit.
        """
        self._trt, self._cuda = trt, cuda
        self._buffers: list[StagedBuffer] = []
        self._streams: list[int] = []
        self._graph_handles: list[int] = []
        release = weakref.finalize(
            self, cuda.release, self._buffers, self._streams, self._graph_handles
        )
        release.atexit = False  # When the process ends, the driver cleans up by itself.
        self._cuda_graphs = cuda_graphs
        self._lock = threading.Lock()  # For making lanes.
        self._lanes, self._most_lanes = 0, _MOST_LANES
        # The lane used last comes first: a single thread stays in one, and so with its graphs.
        self._free: queue.LifoQueue[_Lane] = queue.LifoQueue()
        with cuda.current():
            self._runtime, self._engine = self._load(plan)
            self.input_name, self.output_name = self._tensor_names()
            self._input_dtype = self._dtype(self.input_name)
            self._output_dtype = self._dtype(self.output_name)
            low, _, high = self._engine.get_tensor_profile_shape(self.input_name, 0)
            self.min_shape, self.max_shape = tuple(low), tuple(high)
            """Smallest and largest input that runs in one go; axis 0 counts rows."""
            context = self._new_context()
            self._set_shape(context, self.max_shape)
            self._max_output = tuple(context.get_tensor_shape(self.output_name))
            if self._max_output[0] != self.max_shape[0] or min(self._max_output) < 1:
                raise BackendError(
                    f"the engine is not a tower: {self.max_shape} in gives {self._max_output} out"
                )
            self._row_shape = self._max_output[1:]
            self._free.put(self._new_lane(context))

    def run(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Run the engine on (N, ...) rows, in pieces if they are many.

        Return (N, ...) for the caller.
        """
        self._check(rows)
        found = np.empty((len(rows), *self._row_shape), self._output_dtype)
        running: deque[tuple[_Lane, NDArray[Any]]] = deque()
        with self._cuda.current():
            try:
                for start in range(0, len(rows), self.max_shape[0]):
                    piece = slice(start, start + self.max_shape[0])
                    # Whoever has a batch running must not wait for a lane: two might, for ever.
                    lane = self._take_lane(wait=not running)
                    if lane is None:
                        self._finish(*running.popleft())
                        lane = self._take_lane(wait=True)
                        assert lane is not None
                    running.append((lane, found[piece]))
                    self._start(lane, rows[piece])
                    if len(running) > 1:
                        self._finish(*running.popleft())
                while running:
                    self._finish(*running.popleft())
            finally:
                for lane, _ in running:  # After an error.
                    self._give_back(lane)
        return found

    def _take_lane(self, wait: bool) -> _Lane | None:
        try:
            return self._free.get_nowait()
        except queue.Empty:
            pass
        with self._lock:
            if self._lanes < self._most_lanes:
                try:
                    return self._new_lane(self._new_context())
                except BackendError as error:
                    get_logger("upperson_tensorrt").warning(
                        "batches take turns from here on, two at once need more memory: %s", error
                    )
                    self._most_lanes = self._lanes
        return self._free.get() if wait else None

    def _new_lane(self, context: Any) -> _Lane:
        sizes = (
            self._input_dtype.itemsize * math.prod(self.max_shape),
            self._output_dtype.itemsize * math.prod(self._max_output),
        )
        made = []
        for nbytes in sizes:
            made.append(self._cuda.staged_buffer(nbytes))
            self._buffers.append(made[-1])
        stream = self._cuda.new_stream()
        self._streams.append(stream)
        lane = _Lane(stream, (made[0], made[1]), context)
        self._bind(lane, context)
        self._lanes += 1
        return lane

    def _start(self, lane: _Lane, rows: NDArray[Any]) -> None:
        lane.input.host[: rows.nbytes].view(self._input_dtype).reshape(rows.shape)[...] = rows
        self._cuda.upload(lane.input, rows.nbytes, lane.stream)
        graph = self._graph(lane, rows.shape) if self._cuda_graphs else None
        if graph is not None:
            self._cuda.launch(graph, lane.stream)
        else:
            self._set_shape(lane.context, rows.shape)
            self._execute(lane.context, lane.stream)
        self._cuda.download(lane.output, self._output_nbytes(len(rows)), lane.stream)

    def _finish(self, lane: _Lane, found: NDArray[Any]) -> None:
        try:
            self._cuda.synchronize(lane.stream)
            nbytes = self._output_nbytes(len(found))
            found[...] = lane.output.host[:nbytes].view(self._output_dtype).reshape(found.shape)
        finally:
            self._free.put(lane)

    def _give_back(self, lane: _Lane) -> None:
        """Let a lane go after an error, when nothing reads or writes its buffers any more."""
        try:
            self._cuda.synchronize(lane.stream)
        except BackendError:
            pass  # Another error is on its way already.
        finally:
            self._free.put(lane)

    def _output_nbytes(self, rows: int) -> int:
        return self._output_dtype.itemsize * math.prod((rows, *self._row_shape))

    def _graph(self, lane: _Lane, shape: tuple[int, ...]) -> int | None:
        """Return the graph of a shape, captured once the shape has come back.

        The input is on the device.
        """
        if shape in lane.graphs:
            return lane.graphs[shape][0]
        lane.runs[shape] += 1
        if lane.runs[shape] <= _RUNS_BEFORE_CAPTURE or len(lane.graphs) >= _MOST_GRAPHS:
            return None
        # A graph is bound to the state of its context, so that context serves no other shape.
        context = self._new_context()
        self._bind(lane, context)
        self._set_shape(context, shape)
        # The first run after a change of shape does work of its own that must not be captured.
        expected = self._result(lane, shape, lambda: self._execute(context, lane.stream))
        try:
            graph = self._cuda.capture(lane.stream, lambda: self._execute(context, lane.stream))
        except BackendError as error:
            self._no_graphs(f"the engine cannot be captured: {error}")
            return None
        self._graph_handles.append(graph)
        if self._result(lane, shape, lambda: self._cuda.launch(graph, lane.stream)) != expected:
            self._no_graphs(f"the graph of {shape} gives other results than the engine")
            return None
        lane.graphs[shape] = (graph, context)
        return graph

    def _result(self, lane: _Lane, shape: tuple[int, ...], work: Callable[[], None]) -> bytes:
        """Run something on the lane's input and return what it leaves in the output."""
        nbytes = self._output_nbytes(shape[0])
        lane.output.host[:nbytes] = 0xFF
        self._cuda.upload(lane.output, nbytes, lane.stream)
        work()
        self._cuda.download(lane.output, nbytes, lane.stream)
        self._cuda.synchronize(lane.stream)
        return lane.output.host[:nbytes].tobytes()

    def _no_graphs(self, reason: str) -> None:
        get_logger("upperson_tensorrt").warning("no CUDA graphs from here on, %s", reason)
        self._cuda_graphs = False

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
                f"{self._input_dtype} (N, {ranges}), found {rows.dtype} {rows.shape}",
                code="run_failed",
                found=f"{rows.dtype} {rows.shape}",
            )

    def _load(self, plan: bytes) -> tuple[Any, Any]:
        log = trt_log(self._trt)
        log.take_errors()
        try:
            runtime = self._trt.Runtime(log.logger)
        except (TypeError, RuntimeError) as error:  # How pybind11 reports a null pointer.
            raise BackendError(
                f"TensorRT {self._trt.__version__} does not start;  upperson-rt doctor  says why"
            ) from error
        runtime.error_recorder = log.recorder  # What is made from it reports there, too.
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            advice = "compile it again with  upperson-rt compile"
            raise self._error("refuses the engine", advice, "engine_refused")
        return runtime, engine

    def _tensor_names(self) -> tuple[str, str]:
        engine, mode = self._engine, self._trt.TensorIOMode
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        names.sort(key=lambda name: engine.get_tensor_mode(name) != mode.INPUT)
        source, result = names  # One of each: `build_engine` takes no other graph.
        return source, result

    def _new_context(self) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise self._error(
                "cannot make an execution context", "close other programs if memory is short"
            )
        return context

    def _bind(self, lane: _Lane, context: Any) -> None:
        for name, buffer in ((self.input_name, lane.input), (self.output_name, lane.output)):
            if not context.set_tensor_address(name, buffer.device_address):
                raise self._error(f"refuses the address of '{name}'")

    def _set_shape(self, context: Any, shape: tuple[int, ...]) -> None:
        if not context.set_input_shape(self.input_name, shape):
            raise self._error(f"refuses the shape {shape}")

    def _execute(self, context: Any, stream: int) -> None:
        if not context.execute_async_v3(stream):
            raise self._error("failed")

    def _dtype(self, name: str) -> np.dtype[Any]:
        dtype = self._engine.get_tensor_dtype(name).name
        if dtype not in _DTYPES:
            raise BackendError(
                f"the engine's tensor '{name}' is {dtype}, expected one of {', '.join(_DTYPES)}: "
                "export the bundle again"
            )
        return np.dtype(_DTYPES[dtype])

    def _error(
        self, problem: str, advice: str = "see  upperson-rt doctor", code: str = "run_failed"
    ) -> BackendError:
        reason = trt_log(self._trt).take_errors()
        message = f"TensorRT {self._trt.__version__} {problem}: {reason}; {advice}"
        return BackendError(message, code=code)

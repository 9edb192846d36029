"""A stand-in for the module `tensorrt` in three versions: the names our code may rely on, no more.

Which names a version has, with which parameters and types, is compared with NVIDIA's own bindings
in ``test_tensorrt_contract.py``. Arguments of other types are refused as pybind11 refuses them, and
so are attributes that a class does not have. An engine holds the ONNX file and runs it with ONNX
Runtime, so results are real; `FakeBehaviour` makes a build go wrong.
"""

import ctypes
import enum
import functools
import inspect
import json
import sys
import types
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from typing import Any, get_args

import numpy as np
import onnx

from tests.helpers.fake_cuda import FakeDriver

VERSIONS = ("10.3.0.26", "10.16.1.11", "11.4.0.106")


class Dims(tuple):
    """Sizes; pybind11 makes them of a tuple or list of whole numbers."""


class Buffer:
    """Stands for bytes and what else has them, as ``buffer`` in pybind11's signatures."""


@dataclass
class FakeBehaviour:
    """What goes wrong, and what was seen."""

    wrong_batch: int | None = None
    """Engines miscompute at this batch size, without an error."""
    wrong_graphs: bool = False
    """Engines miscompute when they run as a graph."""
    no_plan: bool = False
    """The builder runs out of memory."""
    on_step: Any = None
    """Called at each step of a build."""
    last_config: Any = None
    """The settings of the last build."""
    python_lines: list = field(default_factory=list)
    """Log messages that reached Python code."""
    contexts: int = 0
    """Execution contexts made."""


def install_fake_tensorrt(monkeypatch, release=VERSIONS[0], *gpus, **options):
    """Put a driver and a TensorRT in the place of the real ones; return both."""
    driver = FakeDriver(*gpus, **options).install(monkeypatch)
    trt = make_fake_tensorrt(release, driver)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    return driver, trt


class _EnumMember(enum.Enum):
    """As pybind11 makes them: ``int(member)`` works, arithmetic does not."""

    def __int__(self):
        return self.value


def _enum(name, **members):
    return _EnumMember(name, members)


def _fits(value, kind):
    if kind is Dims:
        return isinstance(value, (tuple, list)) and all(_fits(n, int) for n in value)
    if kind is int:
        return isinstance(value, (int, np.integer))
    if kind is Buffer:
        return isinstance(value, (bytes, bytearray, memoryview))
    return any(isinstance(value, one) for one in get_args(kind) or (kind,))


def _checked(function):
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*arguments, **keywords):
        bound = signature.bind(*arguments, **keywords)
        for name, value in bound.arguments.items():
            kind = signature.parameters[name].annotation
            if kind is not inspect.Parameter.empty and not _fits(value, kind):
                raise TypeError(f"{function.__name__}(): incompatible function arguments: {name}")
        return function(*arguments, **keywords)

    return call


def like_pybind(cls):
    """Check arguments by their annotations, and refuse attributes that the class does not have."""
    for name, member in list(vars(cls).items()):
        if inspect.isfunction(member) and (name == "__init__" or not name.startswith("_")):
            setattr(cls, name, _checked(member))
        if isinstance(member, property) and member.fset:
            setattr(cls, name, property(member.fget, _checked(member.fset)))

    def set_attribute(self, name, value):
        if not name.startswith("_") and not hasattr(cls, name) and type(self) is cls:
            raise AttributeError(f"'{cls.__name__}' object has no attribute '{name}'")
        object.__setattr__(self, name, value)

    cls.__setattr__ = set_attribute
    return cls


def make_fake_tensorrt(version, driver, behaviour=None):
    """Return the module; `driver` is the `FakeDriver` whose memory and streams it uses."""
    behaviour = behaviour or FakeBehaviour()
    is_10 = version.startswith("10.")
    trt = types.ModuleType("tensorrt")
    trt.__spec__ = ModuleSpec("tensorrt", None)
    trt.__version__ = version
    trt.behaviour = behaviour
    Severity = _enum("Severity", INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)
    DataType = _enum("DataType", FLOAT=0, HALF=1, INT8=2, INT32=3, BOOL=4, UINT8=5)
    ErrorCodeTRT = _enum("ErrorCodeTRT", UNSPECIFIED_ERROR=1, FAILED_INITIALIZATION=6)
    TensorIOMode = _enum("TensorIOMode", NONE=0, INPUT=1, OUTPUT=2)
    MemoryPoolType = _enum("MemoryPoolType", WORKSPACE=0, TACTIC_DRAM=4)
    removed = {"FP16": 0, "INT8": 1} if is_10 else {}
    BuilderFlag = _enum("BuilderFlag", DEBUG=2, REFIT=4, TF32=6, **removed)
    flags = {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1} if is_10 else {"STRONGLY_TYPED": 0}
    NetworkDefinitionCreationFlag = _enum("NetworkDefinitionCreationFlag", **flags)

    @like_pybind
    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING
        INFO, VERBOSE = Severity.INFO, Severity.VERBOSE

        def log(self, severity: Severity, msg: str) -> None:
            raise NotImplementedError("pure virtual")

    @like_pybind
    class Logger(ILogger):
        def __init__(self, min_severity: Severity = Severity.WARNING) -> None:
            self._level = min_severity

        def log(self, severity: Severity, msg: str) -> None:
            if int(severity) <= int(self._level):
                print(f"[TRT] {severity.name} {msg}")

    @like_pybind
    class IErrorRecorder:
        def report_error(self, arg0: ErrorCodeTRT, arg1: str) -> bool:
            raise NotImplementedError("pure virtual")

    @like_pybind
    class IProgressMonitor:
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            raise NotImplementedError("pure virtual")

        def step_complete(self, phase_name: str, step: int) -> bool:
            raise NotImplementedError("pure virtual")

        def phase_finish(self, phase_name: str) -> None:
            raise NotImplementedError("pure virtual")

    @like_pybind
    class IHostMemory(bytes):
        @property
        def nbytes(self) -> int:
            return len(self)

    def tell(logger, severity, message):
        """Log as C++ does: only what overrides `log` in Python is called."""
        if not isinstance(logger, Logger):
            behaviour.python_lines.append(message)
        logger.log(severity, message)

    def fail(logger, recorder, message):
        tell(logger, ILogger.ERROR, message)
        if recorder is not None:
            recorder.report_error(ErrorCodeTRT.UNSPECIFIED_ERROR, message)

    def require_driver(logger):
        if not driver.gpus or driver.fail.get("cuInit"):
            tell(logger, ILogger.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        assert driver.current_gpu is not None, "no device is current"
        tell(logger, ILogger.VERBOSE, "Registered plugin creator - ::Something version 1")

    def recorder_property():
        def get(self) -> IErrorRecorder:
            return self._recorder

        def put(self, arg1: IErrorRecorder) -> None:
            self._recorder = arg1

        return property(get, put)

    @like_pybind
    class ITensor:
        def __init__(self, value) -> None:
            self._name = value.name
            kind = value.type.tensor_type
            self._dtype = {
                onnx.TensorProto.FLOAT: DataType.FLOAT,
                onnx.TensorProto.UINT8: DataType.UINT8,
                onnx.TensorProto.INT32: DataType.INT32,
                onnx.TensorProto.FLOAT16: DataType.HALF,
            }[kind.elem_type]
            self._shape = Dims(
                d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim
            )

        @property
        def name(self) -> str:
            return self._name

        @property
        def dtype(self) -> DataType:
            return self._dtype

        @property
        def shape(self) -> Dims:
            return self._shape

    @like_pybind
    class INetworkDefinition:
        def __init__(self, flags) -> None:
            if is_10:
                wanted = 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED)
                assert flags == wanted, "weakly typed network"
            self._inputs, self._outputs, self._onnx_bytes = [], [], b""

        @property
        def num_inputs(self) -> int:
            return len(self._inputs)

        @property
        def num_outputs(self) -> int:
            return len(self._outputs)

        def get_input(self, index: int) -> ITensor:
            return self._inputs[index]

    @like_pybind
    class ParserError:
        def __init__(self, desc, node=None) -> None:
            self._desc, self._node = desc, node

        def desc(self) -> str:
            return self._desc

        def node_name(self) -> str:
            return self._node.name if self._node else ""

        def node_operator(self) -> str:
            return self._node.op_type if self._node else ""

    @like_pybind
    class OnnxParser:
        def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
            self._network, self._errors = network, []

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> ParserError:
            return self._errors[index]

        def parse_from_file(self, model: str) -> bool:
            with open(model, "rb") as file:
                content = file.read()
            try:
                graph = onnx.load_from_string(content).graph
            except Exception:
                self._errors.append(ParserError("Failed to parse the ONNX model."))
                return False
            for node in graph.node:
                if node.op_type in ("Det", "DynamicQuantizeLinear"):
                    self._errors.append(ParserError("UNSUPPORTED_NODE:\n no such importer", node))
            self._network._onnx_bytes = content
            self._network._inputs = [ITensor(value) for value in graph.input]
            self._network._outputs = [ITensor(value) for value in graph.output]
            return not self._errors

    @like_pybind
    class IOptimizationProfile:
        def __init__(self) -> None:
            self._shapes = {}

        def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None:
            self._shapes[input] = (tuple(min), tuple(opt), tuple(max))

    @like_pybind
    class ITimingCache:
        def __init__(self, entries) -> None:
            self._entries = entries

        def serialize(self) -> IHostMemory:
            return IHostMemory(f"timings {version} {self._entries}".encode())

    @like_pybind
    class IBuilderConfig:
        def __init__(self, logger) -> None:
            self._logger = logger
            self._flags = {BuilderFlag.TF32}
            self._pools, self._profiles, self._monitor, self._cache = {}, [], None, None

        def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
            self._pools[pool] = pool_size

        def clear_flag(self, flag: BuilderFlag) -> None:
            self._flags.discard(flag)

        def set_flag(self, flag: BuilderFlag) -> None:
            self._flags.add(flag)

        @property
        def progress_monitor(self) -> IProgressMonitor:
            return self._monitor

        @progress_monitor.setter
        def progress_monitor(self, arg1: IProgressMonitor) -> None:
            self._monitor = arg1

        def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
            for low, typical, high in profile._shapes.values():
                if not all(a <= b <= c for a, b, c in zip(low, typical, high, strict=True)):
                    return -1
            self._profiles.append(profile)
            return len(self._profiles) - 1

        def create_timing_cache(self, serialized_timing_cache: Buffer) -> ITimingCache:
            content = bytes(serialized_timing_cache)
            word, _, rest = content.partition(b" ")
            if content and (word != b"timings" or rest.split(b" ")[0] != version.encode()):
                tell(self._logger, ILogger.WARNING, "Failed to deserialize timing cache.")
                return ITimingCache(0)
            return ITimingCache(int(rest.split(b" ")[1]) if content else 0)

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
            self._cache = cache
            return True

        def get_timing_cache(self) -> ITimingCache:
            return self._cache

    @like_pybind
    class Builder:
        error_recorder = recorder_property()

        def __init__(self, logger: ILogger) -> None:
            require_driver(logger)
            self._logger, self._recorder = logger, None

        def create_network(self, flags: int = 0) -> INetworkDefinition:
            return INetworkDefinition(flags)

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig(self._logger)

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(
            self, network: INetworkDefinition, config: IBuilderConfig
        ) -> IHostMemory:
            behaviour.last_config = config
            assert config._profiles, "dynamic shapes without a profile"
            assert driver.current_gpu is not None, "no device is current"
            monitor = config._monitor
            monitor.phase_start("Building engine", None, 3)
            for step in range(3):
                tell(self._logger, ILogger.VERBOSE, "*************** Autotuning Reformat ********")
                if behaviour.on_step:
                    behaviour.on_step(step)
                if not monitor.step_complete("Building engine", step):
                    fail(self._logger, self._recorder, "build cancelled")
                    return None
            monitor.phase_finish("Building engine")
            if behaviour.no_plan:
                fail(self._logger, self._recorder, "Could not find any implementation")
                return None
            if config._cache is not None:
                config._cache._entries += 1
            header = {
                "version": version,
                "gpu": driver.gpus[driver.current_gpu][0],
                "profile": config._profiles[0]._shapes,
            }
            return IHostMemory(json.dumps(header).encode() + b"\n" + network._onnx_bytes)

    @like_pybind
    class Runtime:
        error_recorder = recorder_property()

        def __init__(self, logger: ILogger) -> None:
            require_driver(logger)
            self._logger, self._recorder = logger, None

        def deserialize_cuda_engine(self, serialized_engine: Buffer):
            assert driver.current_gpu is not None, "no device is current"
            header, newline, onnx_bytes = bytes(serialized_engine).partition(b"\n")
            about = json.loads(header) if newline else {}
            here = driver.gpus[driver.current_gpu][0]
            if (about.get("version"), about.get("gpu")) != (version, here):
                fail(self._logger, self._recorder, "the engine plan file is not compatible")
                return None
            return ICudaEngine(self, about["profile"], onnx_bytes)

    @like_pybind
    class ICudaEngine:
        def __init__(self, runtime, profile, onnx_bytes) -> None:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self._runtime = runtime
            self._session = onnxruntime.InferenceSession(
                onnx_bytes, options, providers=["CPUExecutionProvider"]
            )
            graph = onnx.load_from_string(onnx_bytes).graph
            self._inputs = {value.name: ITensor(value) for value in graph.input}
            self._tensors = self._inputs | {value.name: ITensor(value) for value in graph.output}
            self._profile = profile

        @property
        def num_io_tensors(self) -> int:
            return len(self._tensors)

        def get_tensor_name(self, index: int) -> str:
            return list(self._tensors)[index]

        def get_tensor_mode(self, name: str) -> TensorIOMode:
            return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> DataType:
            return self._tensors[name].dtype

        def get_tensor_profile_shape(self, name: str, profile_index: int):
            assert profile_index == 0
            return [Dims(shape) for shape in self._profile[name]]

        def create_execution_context(self):
            assert driver.current_gpu is not None, "no device is current"
            behaviour.contexts += 1
            return IExecutionContext(self)

    @like_pybind
    class IExecutionContext:
        def __init__(self, engine) -> None:
            self._engine, self._shape, self._prepared, self._addresses = engine, None, None, {}
            self._stream = None

        def set_input_shape(self, name: str, shape: Dims) -> bool:
            low, _, high = self._engine.get_tensor_profile_shape(name, 0)
            if not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
                return False
            self._shape = Dims(shape)
            return True

        def get_tensor_shape(self, name: str) -> Dims:
            tensor = self._engine._tensors[name]
            if name in self._engine._inputs:
                return self._shape
            return Dims((self._shape[0], *tensor.shape[1:]))

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self._addresses[name] = memory
            return True  # The real one does not look at it, either: it fails when it runs.

        def execute_async_v3(self, stream_handle: int) -> bool:
            assert driver.current_gpu is not None, "no device is current"
            assert stream_handle in driver.streams, "no such stream"
            assert self._stream in (None, stream_handle), "a context runs on two streams"
            self._stream = stream_handle
            for name in self._engine._tensors:
                memory = driver.device_memory(self._addresses.get(name))
                assert memory is not None, f"'{name}' is at an address that is none of the device"
            capturing = driver.is_capturing(stream_handle)
            if capturing and self._prepared != self._shape:
                return False  # The first run after a change of shape cannot be captured.
            self._prepared = self._shape
            driver.enqueue(
                stream_handle, lambda shape=self._shape: self._execute(shape, in_graph=capturing)
            )
            return True

        def _execute(self, shape, in_graph) -> None:
            assert shape == self._shape, "the context of a captured graph was changed"
            (name,) = self._engine._inputs
            dtype = {DataType.UINT8: np.uint8, DataType.INT32: np.int32}[
                self._engine._inputs[name].dtype
            ]
            nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            rows = np.frombuffer(ctypes.string_at(self._addresses[name], nbytes), dtype)
            (output,) = (n for n in self._engine._tensors if n not in self._engine._inputs)
            (found,) = self._engine._session.run([output], {name: rows.reshape(shape)})
            if behaviour.wrong_batch == shape[0] or (in_graph and behaviour.wrong_graphs):
                found = found[:, ::-1].copy()
            ctypes.memmove(self._addresses[output], found.tobytes(), found.nbytes)

    ILogger.Severity = Severity
    for thing in (
        Dims, Severity, DataType, ErrorCodeTRT, TensorIOMode, MemoryPoolType, BuilderFlag,
        NetworkDefinitionCreationFlag, ILogger, Logger, IErrorRecorder, IProgressMonitor,
        IHostMemory, ITensor, INetworkDefinition, ParserError, OnnxParser, IOptimizationProfile,
        ITimingCache, IBuilderConfig, Builder, Runtime, ICudaEngine, IExecutionContext,
    ):  # fmt: skip
        if thing is not Severity:
            setattr(trt, thing.__name__, thing)
    return trt

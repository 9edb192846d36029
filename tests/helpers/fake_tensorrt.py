"""A stand-in for the module `tensorrt` in three versions: the names our code may rely on, no more.

``test_tensorrt_contract.py`` compares it with NVIDIA's own bindings. Arguments of other types and
attributes that a class does not have are refused as pybind11 refuses them. An engine runs its ONNX
file in ONNX Runtime, so results are real; ``trt.behaviour`` makes it go wrong.
"""

import ctypes
import enum
import functools
import inspect
import json
import sys
import types
from importlib.machinery import ModuleSpec

import numpy as np
import onnx
import onnxruntime

from tests.helpers.fake_cuda import FakeDriver
from upperson_onnxruntime.backend import session_options

VERSIONS = ("10.3.0.26", "10.16.1.11", "11.4.0.106")


class Dims(tuple):
    """Sizes; pybind11 makes them of a tuple or list of whole numbers."""


class Buffer:
    """Stands for bytes and what else has them, as in pybind11's signatures."""


def install_fake_tensorrt(monkeypatch, release=VERSIONS[0], *gpus, **options):
    """Put a driver and a TensorRT in the place of the real ones; return both."""
    driver = FakeDriver(*gpus, **options).install(monkeypatch)
    trt = make_fake_tensorrt(release, driver)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    return driver, trt


class _EnumMember(enum.Enum):
    def __int__(self):  # As in pybind11; arithmetic does not work.
        return self.value


def _fits(value, kind):
    if kind is Dims:
        return isinstance(value, tuple | list) and all(_fits(n, int) for n in value)
    taken = {int: int | np.integer, Buffer: bytes | bytearray | memoryview}
    return isinstance(value, taken.get(kind, kind))


def _checked(function):
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*arguments, **keywords):
        for name, value in signature.bind(*arguments, **keywords).arguments.items():
            kind = signature.parameters[name].annotation
            if kind is not inspect.Parameter.empty and not _fits(value, kind):
                raise TypeError(f"{function.__name__}(): incompatible function arguments: {name}")
        return function(*arguments, **keywords)

    return call


def _property(field, kind, settable=False):
    def get(self) -> kind:
        return getattr(self, field)

    def put(self, value: kind):
        setattr(self, field, value)

    return property(get, _checked(put) if settable else None)


def _like_pybind(cls):
    """Check arguments by their annotations, and refuse attributes that the class does not have."""
    for name, member in list(vars(cls).items()):
        if inspect.isfunction(member) and (name == "__init__" or not name.startswith("_")):
            setattr(cls, name, _checked(member))

    def set_attribute(self, name, value):
        if not name.startswith("_") and not hasattr(cls, name) and type(self) is cls:
            raise AttributeError(f"'{cls.__name__}' object has no attribute '{name}'")
        object.__setattr__(self, name, value)

    cls.__setattr__ = set_attribute
    return cls


def make_fake_tensorrt(version, driver):
    """Return the module; `driver` is the `FakeDriver` whose memory and streams it uses."""
    is_10 = version.startswith("10.")
    trt = types.ModuleType("tensorrt")
    trt.__spec__ = ModuleSpec("tensorrt", None)
    trt.__version__ = version
    trt.behaviour = behaviour = types.SimpleNamespace(
        wrong_batch=None,  # Engines miscompute at this batch size, without an error.
        wrong_graphs=False,  # Engines miscompute when they run as a graph.
        no_plan=False,  # The builder runs out of memory.
        on_step=None,  # Called at each step of a build.
        last_config=None,  # The settings of the last build.
        python_lines=[],  # Log messages that reached Python code.
    )

    def public(cls):
        setattr(trt, cls.__name__, cls)
        return cls if issubclass(cls, enum.Enum) else _like_pybind(cls)

    def enumeration(name, **members):
        return public(_EnumMember(name, members))

    levels = {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4}
    Severity = _EnumMember("Severity", levels)
    DataType = enumeration("DataType", FLOAT=0, HALF=1, INT8=2, INT32=3, BOOL=4, UINT8=5)
    Code = enumeration("ErrorCodeTRT", UNSPECIFIED_ERROR=1, FAILED_INITIALIZATION=6)
    TensorIOMode = enumeration("TensorIOMode", NONE=0, INPUT=1, OUTPUT=2)
    MemoryPoolType = enumeration("MemoryPoolType", WORKSPACE=0, TACTIC_DRAM=4)
    removed = {"FP16": 0, "INT8": 1} if is_10 else {}
    BuilderFlag = enumeration("BuilderFlag", DEBUG=2, REFIT=4, TF32=6, **removed)
    flags = {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1} if is_10 else {"STRONGLY_TYPED": 0}
    NetworkFlag = enumeration("NetworkDefinitionCreationFlag", **flags)

    @public
    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

        def log(self, severity: Severity, msg: str): ...

    @public
    class Logger(ILogger):
        def __init__(self, min_severity: Severity = Severity.WARNING):
            self._level = min_severity

        def log(self, severity: Severity, msg: str):
            if int(severity) <= int(self._level):
                print(f"[TRT] {severity.name} {msg}")

    @public
    class IErrorRecorder:
        def report_error(self, arg0: Code, arg1: str): ...

    @public
    class IProgressMonitor:
        def phase_start(self, phase_name: str, parent_phase, num_steps: int): ...

        def step_complete(self, phase_name: str, step: int): ...

        def phase_finish(self, phase_name: str): ...

    @public
    class IHostMemory(bytes):
        pass

    def log(logger, severity, message):
        """Log as C++ does: only what overrides `log` in Python is called."""
        if not isinstance(logger, Logger):
            behaviour.python_lines.append(message)
        logger.log(severity, message)

    def fail(started, message):
        log(started._logger, ILogger.ERROR, message)
        if started._recorder is not None:
            started._recorder.report_error(Code.UNSPECIFIED_ERROR, message)

    def current_gpu():
        assert driver.current_gpu is not None, "no device is current"
        return driver.gpus[driver.current_gpu][0]

    class Started:
        """What needs a driver, and reports to a recorder."""

        error_recorder = _property("_recorder", IErrorRecorder, settable=True)

        def __init__(self, logger: ILogger):
            self._logger, self._recorder = logger, None
            if not driver.gpus or driver.fail.get("cuInit"):
                log(logger, ILogger.ERROR, "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")
            current_gpu()
            log(logger, ILogger.VERBOSE, "Registered plugin creator - ::Something version 1")

    @public
    class ITensor:
        name, dtype = _property("_name", str), _property("_dtype", DataType)
        shape = _property("_shape", Dims)

        def __init__(self, value):
            kind = value.type.tensor_type
            dtype = onnx.TensorProto.DataType.Name(kind.elem_type).replace("FLOAT16", "HALF")
            self._name, self._dtype = value.name, DataType[dtype]
            sizes = (d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
            self._shape = Dims(sizes)

    @public
    class INetworkDefinition:
        num_inputs, num_outputs = _property("_num_inputs", int), _property("_num_outputs", int)

        def __init__(self, flags):
            assert not is_10 or flags == 1 << int(NetworkFlag.STRONGLY_TYPED), "weakly typed"

        def get_input(self, index: int):
            return ITensor(self._graph.input[index])

        def _take(self, content):
            self._onnx_bytes, self._graph = content, onnx.load_from_string(content).graph
            self._num_inputs, self._num_outputs = len(self._graph.input), len(self._graph.output)
            return self._graph.node

    @public
    class ParserError:
        def __init__(self, desc, node=None):
            self._desc, self._node = desc, node or onnx.NodeProto()

        def desc(self):
            return self._desc

        def node_name(self):
            return self._node.name

        def node_operator(self):
            return self._node.op_type

    @public
    class OnnxParser:
        num_errors = _property("_num_errors", int)

        def __init__(self, network: INetworkDefinition, logger: ILogger):
            self._network, self._errors = network, []

        def get_error(self, index: int):
            return self._errors[index]

        def parse_from_file(self, model: str):
            with open(model, "rb") as file:
                content = file.read()
            try:
                nodes = self._network._take(content)
            except Exception:
                self._errors = [ParserError("Failed to parse the ONNX model.")]
            else:
                self._errors = [
                    ParserError("UNSUPPORTED_NODE:\n no such importer", node)
                    for node in nodes
                    if node.op_type in ("Det", "DynamicQuantizeLinear")
                ]
            self._num_errors = len(self._errors)
            return not self._errors

    @public
    class IOptimizationProfile:
        def __init__(self):
            self._shapes = {}

        def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims):
            self._shapes[input] = (tuple(min), tuple(opt), tuple(max))

    @public
    class ITimingCache:
        def __init__(self, entries):
            self._entries = entries

        def serialize(self):
            return IHostMemory(f"timings {version} {self._entries}".encode())

    @public
    class IBuilderConfig:
        progress_monitor = _property("_monitor", IProgressMonitor, settable=True)

        def __init__(self, logger):
            self._logger, self._flags, self._cache = logger, {BuilderFlag.TF32}, None
            self._pools, self._profiles = {}, []

        def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int):
            self._pools[pool] = pool_size

        def clear_flag(self, flag: BuilderFlag):
            self._flags.discard(flag)

        def add_optimization_profile(self, profile: IOptimizationProfile):
            axes = [axis for one in profile._shapes.values() for axis in zip(*one, strict=True)]
            if any(sorted(axis) != list(axis) for axis in axes):
                return -1
            self._profiles.append(profile)
            return len(self._profiles) - 1

        def create_timing_cache(self, serialized_timing_cache: Buffer):
            made_by, _, entries = bytes(serialized_timing_cache).rpartition(b" ")
            if made_by == f"timings {version}".encode():
                return ITimingCache(int(entries))
            if serialized_timing_cache:
                log(self._logger, ILogger.WARNING, "Failed to deserialize timing cache.")
            return ITimingCache(0)

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool):
            self._cache = cache
            return True

        def get_timing_cache(self):
            return self._cache

    @public
    class Builder(Started):
        def create_network(self, flags: int = 0):
            return INetworkDefinition(flags)

        def create_builder_config(self):
            return IBuilderConfig(self._logger)

        def create_optimization_profile(self):
            return IOptimizationProfile()

        def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig):
            behaviour.last_config = config
            assert config._profiles, "dynamic shapes without a profile"
            gpu = current_gpu()
            config.progress_monitor.phase_start("Building engine", None, 3)
            for step in range(3):
                log(self._logger, ILogger.VERBOSE, "*************** Autotuning Reformat ********")
                if behaviour.on_step:
                    behaviour.on_step(step)
                if not config.progress_monitor.step_complete("Building engine", step):
                    return fail(self, "build cancelled")
            config.progress_monitor.phase_finish("Building engine")
            if behaviour.no_plan:
                return fail(self, "Could not find any implementation")
            if config._cache is not None:
                config._cache._entries += 1
            header = {"made_for": [version, gpu], "profile": config._profiles[0]._shapes}
            return IHostMemory(json.dumps(header).encode() + b"\n" + network._onnx_bytes)

    @public
    class Runtime(Started):
        def deserialize_cuda_engine(self, serialized_engine: Buffer):
            header, newline, onnx_bytes = bytes(serialized_engine).partition(b"\n")
            about = json.loads(header) if newline else {"made_for": None}
            if about["made_for"] != [version, current_gpu()]:
                return fail(self, "the engine plan file is not compatible")
            return ICudaEngine(about["profile"], onnx_bytes)

    @public
    class ICudaEngine:
        num_io_tensors = _property("_num_io_tensors", int)

        def __init__(self, profile, onnx_bytes):
            options = session_options(onnxruntime, 1)
            self._session = onnxruntime.InferenceSession(
                onnx_bytes, options, ["CPUExecutionProvider"]
            )
            graph = onnx.load_from_string(onnx_bytes).graph
            self._inputs = {value.name: ITensor(value) for value in graph.input}
            self._tensors = self._inputs | {value.name: ITensor(value) for value in graph.output}
            self._num_io_tensors, self._profile = len(self._tensors), profile

        def get_tensor_name(self, index: int):
            return list(self._tensors)[index]

        def get_tensor_mode(self, name: str):
            return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str):
            return self._tensors[name].dtype

        def get_tensor_profile_shape(self, name: str, profile_index: int):
            assert profile_index == 0
            return [Dims(shape) for shape in self._profile[name]]

        def create_execution_context(self):
            current_gpu()
            return IExecutionContext(self)

    @public
    class IExecutionContext:
        def __init__(self, engine):
            self._engine, self._addresses = engine, {}
            self._shape = self._prepared = self._stream = None

        def set_input_shape(self, name: str, shape: Dims):
            low, _, high = self._engine.get_tensor_profile_shape(name, 0)
            if not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
                return False
            self._shape = Dims(shape)
            return True

        def get_tensor_shape(self, name: str):
            return Dims((self._shape[0], *self._engine._tensors[name].shape[1:]))

        def set_tensor_address(self, name: str, memory: int):
            self._addresses[name] = memory
            return True  # As the real one, it fails when it runs.

        def execute_async_v3(self, stream_handle: int):
            current_gpu()
            assert stream_handle in driver.streams, "no such stream"
            assert self._stream in (None, stream_handle), "a context runs on two streams"
            self._stream = stream_handle
            for name in self._engine._tensors:
                memory = driver.device_memory(self._addresses.get(name))
                assert memory is not None, f"'{name}' is at an address that is none of the device"
            in_graph, shape = stream_handle in driver.captures, self._shape
            if in_graph and self._prepared != shape:
                return False  # The first run after a change of shape cannot be captured.
            self._prepared = shape
            driver.enqueue(stream_handle, lambda: self._execute(shape, in_graph))
            return True

        def _execute(self, shape, in_graph):
            assert shape == self._shape, "the context of a captured graph was changed"
            ((name, tensor),) = self._engine._inputs.items()
            dtype = {DataType.UINT8: np.uint8, DataType.INT32: np.int32}[tensor.dtype]
            nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            rows = np.frombuffer(ctypes.string_at(self._addresses[name], nbytes), dtype)
            (output,) = self._engine._tensors.keys() - self._engine._inputs.keys()
            (found,) = self._engine._session.run([output], {name: rows.reshape(shape)})
            if behaviour.wrong_batch == shape[0] or (in_graph and behaviour.wrong_graphs):
                found = found[:, ::-1].copy()
            ctypes.memmove(self._addresses[output], found.tobytes(), found.nbytes)

    return trt

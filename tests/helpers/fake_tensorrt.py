"""A stand-in for the module `tensorrt` in three versions: the names our code may rely on, no more.

Which names a version has is what its published API reference says. An engine holds the ONNX file
and runs it with ONNX Runtime, so results are real; `FakeBehaviour` makes a build go wrong.
"""

import ctypes
import enum
import json
import sys
import types
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from typing import Any

import numpy as np
import onnx

from tests.helpers.fake_cuda import FakeDriver

VERSIONS = ("10.3.0.26", "10.16.1.11", "11.4.0.106")


@dataclass
class FakeBehaviour:
    """What goes wrong."""

    wrong_batch: int | None = None
    """Engines miscompute at this batch size, without an error."""
    no_plan: bool = False
    """The builder runs out of memory."""
    on_step: Any = None
    """Called at each step of a build."""
    last_config: Any = None
    """The settings of the last build."""


def install_fake_tensorrt(monkeypatch, version=VERSIONS[0], *gpus):
    """Put a driver and a TensorRT in the place of the real ones; return both."""
    driver = FakeDriver(*gpus).install(monkeypatch)
    trt = make_fake_tensorrt(version, driver)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    return driver, trt


def _enum(name, *members):
    return enum.IntEnum(name, {member: i for i, member in enumerate(members)})


def _only_in(present, **names):
    return names if present else {}


def make_fake_tensorrt(version, driver, behaviour=None):
    """Return the module; `driver` is the `FakeDriver` whose memory and streams it uses."""
    behaviour = behaviour or FakeBehaviour()
    is_10, is_late = version.startswith("10."), not version.startswith("10.3.")
    trt = types.ModuleType("tensorrt")
    trt.__spec__ = ModuleSpec("tensorrt", None)
    trt.__version__ = version
    trt.behaviour = behaviour
    Severity = _enum("Severity", "INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
    DataType = _enum("DataType", "FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8")
    TensorIOMode = _enum("TensorIOMode", "NONE", "INPUT", "OUTPUT")
    MemoryPoolType = _enum("MemoryPoolType", "WORKSPACE", "TACTIC_DRAM")
    removed = (
        "FP16", "BF16", "INT8", "FP8", "INT4", "OBEY_PRECISION_CONSTRAINTS",
        "PREFER_PRECISION_CONSTRAINTS", "REJECT_EMPTY_ALGORITHMS", "WEIGHTLESS",
    ) if is_10 else ()  # fmt: skip
    added = ("STRICT_NANS", "MONITOR_MEMORY", "EDITABLE_TIMING_CACHE") if is_late else ()
    BuilderFlag = _enum(
        "BuilderFlag", "TF32", "REFIT", "STRIP_PLAN", "VERSION_COMPATIBLE", "DEBUG", "DIRECT_IO",
        "DISABLE_TIMING_CACHE", "ERROR_ON_TIMING_CACHE_MISS", "SPARSE_WEIGHTS", *removed, *added,
    )  # fmt: skip
    CreationFlag = _enum(
        "NetworkDefinitionCreationFlag",
        *(("EXPLICIT_BATCH", "STRONGLY_TYPED") if is_10 else ("STRONGLY_TYPED",)),
    )

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING
        INFO, VERBOSE = Severity.INFO, Severity.VERBOSE

    class IProgressMonitor:
        pass

    class IHostMemory(bytes):
        @property
        def nbytes(self):
            return len(self)

    def require_driver(logger):
        if not driver.gpus or driver.fail.get("cuInit"):
            logger.log(ILogger.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        assert driver.current_gpu is not None, "no device is current"

    class Tensor:
        def __init__(self, value):
            self.name = value.name
            kind = value.type.tensor_type
            self.dtype = {
                onnx.TensorProto.FLOAT: DataType.FLOAT,
                onnx.TensorProto.UINT8: DataType.UINT8,
                onnx.TensorProto.INT32: DataType.INT32,
                onnx.TensorProto.FLOAT16: DataType.HALF,
            }[kind.elem_type]
            self.shape = tuple(
                d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim
            )

    class INetworkDefinition:
        def __init__(self, flags):
            if is_10:
                assert flags == 1 << int(CreationFlag.STRONGLY_TYPED), "weakly typed network"
            self.inputs, self.outputs, self.onnx_bytes = [], [], b""

        num_inputs = property(lambda self: len(self.inputs))
        num_outputs = property(lambda self: len(self.outputs))

        def get_input(self, index):
            return self.inputs[index]

    class ParserError:
        def __init__(self, desc, node=None):
            self._desc, self._node = desc, node

        def desc(self):
            return self._desc

        def node_name(self):
            return self._node.name if self._node else ""

        def node_operator(self):
            return self._node.op_type if self._node else ""

    class OnnxParser:
        def __init__(self, network, logger):
            self._network, self._errors = network, []

        num_errors = property(lambda self: len(self._errors))

        def get_error(self, index):
            return self._errors[index]

        def parse_from_file(self, path):
            with open(path, "rb") as file:
                content = file.read()
            try:
                model = onnx.load_from_string(content)
            except Exception:
                self._errors.append(ParserError("Failed to parse the ONNX model."))
                return False
            for node in model.graph.node:
                if node.op_type in ("Det", "DynamicQuantizeLinear"):
                    self._errors.append(ParserError("UNSUPPORTED_NODE:\n no such importer", node))
            self._network.onnx_bytes = content
            self._network.inputs = [Tensor(value) for value in model.graph.input]
            self._network.outputs = [Tensor(value) for value in model.graph.output]
            return not self._errors

    class IOptimizationProfile:
        def __init__(self):
            self.shapes = {}

        def set_shape(self, input, min, opt, max):
            self.shapes[input] = (tuple(min), tuple(opt), tuple(max))

    class ITimingCache:
        def __init__(self, entries):
            self.entries = entries

        def serialize(self):
            return IHostMemory(f"timings {version} {self.entries}".encode())

    class IBuilderConfig:
        def __init__(self, logger):
            self._logger = logger
            self.flags = {BuilderFlag.TF32}
            self.pools, self.profiles, self.progress_monitor, self._cache = {}, [], None, None

        def set_memory_pool_limit(self, pool, nbytes):
            self.pools[pool] = nbytes

        def clear_flag(self, flag):
            self.flags.discard(flag)

        def set_flag(self, flag):
            self.flags.add(flag)

        def add_optimization_profile(self, profile):
            for low, typical, high in profile.shapes.values():
                if not all(a <= b <= c for a, b, c in zip(low, typical, high, strict=True)):
                    return -1
            self.profiles.append(profile)
            return len(self.profiles) - 1

        def create_timing_cache(self, content):
            word, _, rest = bytes(content).partition(b" ")
            if content and (word != b"timings" or rest.split(b" ")[0] != version.encode()):
                self._logger.log(ILogger.WARNING, "Failed to deserialize timing cache.")
                return ITimingCache(0)
            return ITimingCache(int(rest.split(b" ")[1]) if content else 0)

        def set_timing_cache(self, cache, ignore_mismatch):
            self._cache = cache
            return True

        def get_timing_cache(self):
            return self._cache

    class Builder:
        def __init__(self, logger):
            require_driver(logger)
            self._logger = logger

        def create_network(self, flags=0):
            return INetworkDefinition(flags)

        def create_builder_config(self):
            return IBuilderConfig(self._logger)

        def create_optimization_profile(self):
            return IOptimizationProfile()

        def build_serialized_network(self, network, config):
            behaviour.last_config = config
            assert config.profiles, "dynamic shapes without a profile"
            monitor = config.progress_monitor
            monitor.phase_start("Building engine", None, 3)
            for step in range(3):
                if behaviour.on_step:
                    behaviour.on_step(step)
                if not monitor.step_complete("Building engine", step):
                    self._logger.log(ILogger.ERROR, "build cancelled")
                    return None
            monitor.phase_finish("Building engine")
            if behaviour.no_plan:
                self._logger.log(ILogger.ERROR, "Could not find any implementation")
                return None
            if config.get_timing_cache() is not None:
                config.get_timing_cache().entries += 1
            header = {
                "version": version,
                "gpu": driver.gpus[driver.current_gpu][0],
                "profile": config.profiles[0].shapes,
            }
            return IHostMemory(json.dumps(header).encode() + b"\n" + network.onnx_bytes)

    class Runtime:
        def __init__(self, logger):
            require_driver(logger)
            self._logger = logger

        def deserialize_cuda_engine(self, plan):
            header, newline, onnx_bytes = bytes(plan).partition(b"\n")
            about = json.loads(header) if newline else {}
            here = driver.gpus[driver.current_gpu][0]
            if (about.get("version"), about.get("gpu")) != (version, here):
                self._logger.log(ILogger.ERROR, "the engine plan file is not compatible")
                return None
            return ICudaEngine(about["profile"], onnx_bytes)

    class ICudaEngine:
        def __init__(self, profile, onnx_bytes):
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self._session = onnxruntime.InferenceSession(
                onnx_bytes, options, providers=["CPUExecutionProvider"]
            )
            graph = onnx.load_from_string(onnx_bytes).graph
            self._inputs = {value.name: Tensor(value) for value in graph.input}
            self._tensors = self._inputs | {value.name: Tensor(value) for value in graph.output}
            self._profile = profile
            self.device_memory_size_v2 = 1 << 20
            vars(self).update(_only_in(is_10, device_memory_size=1 << 20))

        num_io_tensors = property(lambda self: len(self._tensors))

        def get_tensor_name(self, index):
            return list(self._tensors)[index]

        def get_tensor_mode(self, name):
            return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name):
            return self._tensors[name].dtype

        def get_tensor_profile_shape(self, name, index):
            assert index == 0
            return [tuple(shape) for shape in self._profile[name]]

        def create_execution_context(self):
            return IExecutionContext(self)

    class IExecutionContext:
        def __init__(self, engine):
            self._engine, self._shape, self._prepared, self._addresses = engine, None, None, {}

        def set_input_shape(self, name, shape):
            low, _, high = self._engine.get_tensor_profile_shape(name, 0)
            if not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
                return False
            self._shape = tuple(shape)
            return True

        def get_tensor_shape(self, name):
            tensor = self._engine._tensors[name]
            return self._shape if name in self._engine._inputs else (
                self._shape[0], *tensor.shape[1:]
            )  # fmt: skip

        def set_tensor_address(self, name, address):
            self._addresses[name] = address
            return address in driver.memory

        def execute_async_v3(self, stream):
            assert driver.current_gpu is not None, "no device is current"
            if driver.is_capturing(stream) and self._prepared != self._shape:
                return False  # The first run after a change of shape cannot be captured.
            self._prepared = self._shape
            driver.enqueue(stream, lambda shape=self._shape: self._execute(shape))
            return True

        def _execute(self, shape):
            assert shape == self._shape, "the context of a captured graph was changed"
            (name,) = self._engine._inputs
            dtype = {DataType.UINT8: np.uint8, DataType.INT32: np.int32}[
                self._engine._inputs[name].dtype
            ]
            nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            rows = np.frombuffer(ctypes.string_at(self._addresses[name], nbytes), dtype)
            (output,) = (n for n in self._engine._tensors if n not in self._engine._inputs)
            (found,) = self._engine._session.run([output], {name: rows.reshape(shape)})
            if behaviour.wrong_batch == shape[0]:
                found = found[:, ::-1].copy()
            ctypes.memmove(self._addresses[output], found.tobytes(), found.nbytes)

    for thing in (
        ILogger, IProgressMonitor, DataType, TensorIOMode, MemoryPoolType, BuilderFlag, OnnxParser,
        Builder, Runtime, ICudaEngine, IExecutionContext,
    ):  # fmt: skip
        setattr(trt, thing.__name__, thing)
    trt.NetworkDefinitionCreationFlag = CreationFlag
    return trt

"""TensorRT for RTX: NVIDIA's compiler ahead of time, on a machine without a GPU.

It is a sibling of TensorRT for consumer cards and makes no engine for a Jetson. For everyone else
it answers what no linter can: whether the compiler takes a graph, and what it fuses.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import onnx

from upperson_rt.errors import BackendError, InputError, UsageError
from upperson_rt.tensorrt.profiles import InputProfile

_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[.*?\], TacticName: .*?Metadata: (?P<nodes>.*)"
)


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """One kernel of an engine."""

    name: str

    kind: str
    """The compiler's word, such as ``gemm`` or ``kgen``."""

    types: frozenset[str]
    """Types of its inputs and constants, such as ``Int8`` and ``Half``."""

    nodes: tuple[str, ...]
    """Names of the ONNX nodes it computes."""


@dataclass(frozen=True, slots=True)
class RtxEngine:
    """A serialized engine and what the compiler said about it."""

    content: bytes
    version: str
    """Of TensorRT for RTX; an engine runs with that version only."""

    layers: tuple[FusedLayer, ...]

    def fused_attentions(self) -> list[FusedLayer]:
        """Return the kernels that compute a whole softmax(q k^T) v."""
        return [layer for layer in self.layers if layer.name.startswith("_gemm_mha")]

    def int8_gemms(self) -> list[FusedLayer]:
        """Return the matrix products of int8 activations and int8 weights."""
        return [
            layer
            for layer in self.layers
            # Its scales are Float; with Half beside Int8, an operand was dequantized before.
            if layer.kind == "gemm" and "Int8" in layer.types and "Half" not in layer.types
        ]


def build_rtx_engine(
    model: onnx.ModelProto, profile: InputProfile, compute_capability: str = "8.6"
) -> RtxEngine:
    """Compile a tower for a GPU that need not be there.

    Args:
        model: The tower, best a typed one (``fp16`` or ``int8-fp16``).
        profile: Its input and the shapes it must take.
        compute_capability: Of the GPU: 7.5, 8.0, 8.6, 8.9, 12.0 or 12.1.

    Raises:
        BackendError: The package is missing, or the compiler fails.
        InputError: The compiler refuses the graph; the message names the node.
        UsageError: The compiler knows no such GPU.
    """
    trt = _import()
    target = f"SM{compute_capability.replace('.', '')}"
    if target in ("NONE", "CURRENT") or not hasattr(trt.ComputeCapability, target):
        known = sorted(name for name in dir(trt.ComputeCapability) if name.startswith("SM"))
        raise UsageError(
            f"TensorRT for RTX {trt.__version__} compiles for {', '.join(known)}, not for "
            f"{compute_capability}: a Jetson or a data centre GPU builds its own engine with "
            "upperson-rt compile"
        )
    log = _log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model.SerializeToString()):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = (f"{e.node_name()} ({e.node_operator()}): {e.desc()}" for e in errors)
        raise InputError(f"TensorRT for RTX refuses the graph: {'; '.join(reasons)}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    shapes = builder.create_optimization_profile()
    shapes.set_shape(profile.name, profile.min, profile.opt, profile.max)
    if config.add_optimization_profile(shapes) < 0:
        raise InputError(f"TensorRT for RTX refuses the profile {profile} for this graph")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BackendError(f"TensorRT for RTX could not build: {'; '.join(log.problems)}")
    return RtxEngine(bytes(plan), str(trt.__version__), tuple(parse_layers(log.layers)))


def parse_layers(text: str) -> Iterator[FusedLayer]:
    """Read the compiler's table of layers, one a line."""
    for line in text.splitlines():
        match = _LAYER.match(line.strip())
        if match is not None:
            tensors = match["inputs"] + match["constants"]
            yield FusedLayer(
                name=match["name"],
                kind=match["kind"],
                types=frozenset(re.findall(r"Datatype: (\w+)", tensors)),
                nodes=tuple(re.findall(r"\[ONNX Layer: ([^\]]*)\]", match["nodes"])),
            )


def _import() -> Any:
    try:
        return import_module("tensorrt_rtx")
    except (ImportError, OSError) as error:
        raise BackendError(
            f"TensorRT for RTX is not installed ({error}): run  pip install tensorrt-rtx-cu13 "
            "(x86-64 Linux)"
        ) from error


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps problems and the table of layers, which only the verbose log has."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.problems: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.problems.append(" ".join(message.split()))
            elif message.startswith("Layers:"):
                self.layers = message

    return Log()

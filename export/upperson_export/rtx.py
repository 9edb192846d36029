"""TensorRT for RTX: NVIDIA's compiler ahead of time, on a machine without a GPU.

It is a sibling of TensorRT for consumer cards and makes no engine for a Jetson. For everyone else
it answers what no linter can: whether the compiler takes a graph, and what it fuses.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from upperson_rt.errors import BackendError, UsageError
from upperson_rt.tensorrt.builder import (
    DEFAULT_WORKSPACE_MIB,
    BuildProgress,
    InputProfile,
    build_engine,
)

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
    """TensorRT for RTX that made it; it runs with that version only."""

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


def rtx_target(compute_capability: str) -> tuple[ModuleType, str]:
    """Return the bindings and the compiler's name of a GPU; cheap, so it may come before any work.

    Args:
        compute_capability: Of the GPU, such as 8.6.

    Raises:
        BackendError: The package is missing.
        UsageError: The compiler knows no such GPU.
    """
    try:
        trt = import_module("tensorrt_rtx")
    except (ImportError, OSError) as error:
        raise BackendError(
            f"TensorRT for RTX is not installed ({error}): run  pip install tensorrt-rtx-cu13 "
            "(x86-64 Linux)"
        ) from error
    names = {
        f"{name[2:-1]}.{name[-1]}": name for name in dir(trt.ComputeCapability) if name[:2] == "SM"
    }
    if compute_capability not in names:
        known = ", ".join(sorted(names, key=float))
        raise UsageError(
            f"TensorRT for RTX {trt.__version__} compiles for the compute capabilities {known}, "
            f"not for {compute_capability}: a Jetson or a data centre GPU builds its own engine "
            "with  upperson-rt compile"
        )
    return trt, names[compute_capability]


def build_rtx_engine(
    onnx_file: Path,
    profile: InputProfile,
    compute_capability: str = "8.6",
    progress: BuildProgress | None = None,
) -> RtxEngine:
    """Compile a tower for a GPU that need not be there.

    Args:
        onnx_file: The tower, best a typed one (``fp16`` or ``int8-fp16``).
        profile: Its input and the shapes it must take.
        compute_capability: Of the GPU: 7.5, 8.0, 8.6, 8.9, 12.0 or 12.1.
        progress: Told about each step.

    Raises:
        BackendError: The package is missing, or the compiler refuses the graph or fails; the
            message names the node.
        IntegrityError: The graph is not a tower.
        UsageError: The compiler knows no such GPU.
    """
    trt, target = rtx_target(compute_capability)
    built = build_engine(
        trt,
        onnx_file,
        profile,
        workspace_bytes=DEFAULT_WORKSPACE_MIB << 20,
        targets=(target,),
        progress=progress,
    )
    return RtxEngine(built.plan, str(trt.__version__), tuple(parse_layers(built.layers)))


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

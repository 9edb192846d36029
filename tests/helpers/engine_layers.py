"""What TensorRT fused in an engine, from its inspector; for TensorRT for RTX see its own module."""

from __future__ import annotations

import json
import re
from types import ModuleType

from upperson_export.engines import FusedLayer, RtxEngine


def inspect_plan(trt: ModuleType, plan: bytes) -> str:
    """Return the table of layers as JSON; full only for an engine that was built to be detailed.

    A device has to be current.
    """
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(plan)
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def read_layers(text: str, version: str = "") -> RtxEngine:
    """Read that table; the result counts attentions and int8 GEMMs as for TensorRT for RTX."""
    return RtxEngine(b"", version, tuple(map(_layer, json.loads(text)["Layers"])))


def _layer(layer: dict[str, object] | str) -> FusedLayer:
    if isinstance(layer, str):
        raise AssertionError(f"the engine was not built to be detailed: found only '{layer}'")
    tensors = json.dumps([layer.get("Inputs", []), layer.get("Constants", [])])
    types = re.findall(r'"(?:Format/)?Datatype": "([^"]*)"', tensors)
    return FusedLayer(
        name=str(layer["Name"]),
        kind=str(layer["LayerType"]),
        types=frozenset(_type(text) for text in types),
        nodes=tuple(re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(layer.get("Metadata", "")))),
    )


def _type(text: str) -> str:
    """Return ``Half`` for ``Half`` and for ``Row major linear FP16``."""
    for name, pattern in (("Int8", "int8"), ("Half", "half|fp16"), ("Float", "float|fp32")):
        if re.search(pattern, text, re.IGNORECASE):
            return name
    return text

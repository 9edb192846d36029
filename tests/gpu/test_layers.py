"""What TensorRT fuses of ViT-B/16 on this card: no less than TensorRT for RTX does."""

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx_ir as ir
import pytest

from tests.helpers.toy_graphs import TOWERS
from tests.helpers.vit_b16 import PROFILES, export_vit_b16, int8_gemms, vit_b16_variant
from upperson_calibration.graph import TowerGraph
from upperson_export.engines import FusedLayer, RtxEngine
from upperson_rt.tensorrt import builder
from upperson_rt.tensorrt.cuda import Cuda
from upperson_rt.towers import Tower

LAYERS = 12

pytestmark = pytest.mark.timeout(1200)  # Two exports of ViT-B/16, four builds.


@pytest.fixture(scope="module")
def graphs(
    card: None, trt: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> dict[Tower, TowerGraph]:
    return export_vit_b16(tmp_path_factory.mktemp("vit_b16"), LAYERS)


@pytest.fixture
def in_detail(trt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have engines built by which the inspector knows types and ONNX nodes."""
    add_profile = builder._add_profile

    def add(built_by: Any, config: Any, *rest: Any) -> None:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        add_profile(built_by, config, *rest)

    monkeypatch.setattr(builder, "_add_profile", add)


@pytest.mark.parametrize("variant", ["fp16", "int8-fp16"])
@pytest.mark.parametrize("tower", TOWERS)
def test_attention_is_fused_and_int8_stays_int8(
    graphs: dict[Tower, TowerGraph],
    trt: ModuleType,
    cuda: Cuda,
    in_detail: None,
    tower: Tower,
    variant: Any,
    tmp_path: Path,
) -> None:
    file = tmp_path / "tower.onnx"
    ir.save(vit_b16_variant(graphs[tower], variant), file)
    with cuda.current():
        built = builder.build_engine(
            trt, file, PROFILES[tower], workspace_bytes=builder.DEFAULT_WORKSPACE_MIB << 20
        )
        text = inspect_plan(trt, built.plan)
    engine = read_layers(text, trt.__version__)
    attentions, gemms = len(engine.fused_attentions()), len(engine.int8_gemms())
    print(f"{tower} {variant}: {attentions} fused attentions, {gemms} int8 GEMMs", text)
    # That of the last block has one query row; for RTX there is no kernel for it.
    assert LAYERS - 1 <= attentions <= LAYERS
    assert gemms == (int8_gemms(LAYERS) if variant == "int8-fp16" else 0)


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

"""What TensorRT fuses of ViT-B/16 on this card: no less than TensorRT for RTX does."""

import json
import re

import onnx_ir as ir
import pytest

from tests.helpers.toy_graphs import TOWERS
from tests.helpers.vit_b16 import PROFILES, export_vit_b16, int8_gemms, vit_b16_variant
from upperson_export.engines import FusedLayer, RtxEngine
from upperson_tensorrt import builder

LAYERS = 12

pytestmark = pytest.mark.timeout(1200)  # Two exports of ViT-B/16, four builds.


@pytest.fixture(scope="module")
def graphs(card, trt, tmp_path_factory):
    return export_vit_b16(tmp_path_factory.mktemp("vit_b16"), LAYERS)


@pytest.fixture
def in_detail(trt, monkeypatch):
    """Have engines built by which the inspector knows types and ONNX nodes."""
    add_profile = builder._add_profile

    def add(built_by, config, *rest):
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        add_profile(built_by, config, *rest)

    monkeypatch.setattr(builder, "_add_profile", add)


@pytest.mark.parametrize("variant", ["fp16", "int8-fp16"])
@pytest.mark.parametrize("tower", TOWERS)
def test_attention_is_fused_and_int8_stays_int8(
    graphs, trt, cuda, in_detail, tower, variant, tmp_path
):
    file = tmp_path / "tower.onnx"
    ir.save(vit_b16_variant(graphs[tower], variant), file)
    with cuda.current():
        built = builder.build_engine(
            trt, file, PROFILES[tower], workspace_bytes=builder.DEFAULT_WORKSPACE_MIB << 20
        )
        engine = read_layers(trt, built.plan)
    attentions, gemms = len(engine.fused_attentions()), len(engine.int8_gemms())
    print(f"{tower} {variant}: {attentions} fused attentions, {gemms} int8 GEMMs")
    # That of the last block has one query row; for RTX there is no kernel for it.
    assert LAYERS - 1 <= attentions <= LAYERS
    assert gemms == (int8_gemms(LAYERS) if variant == "int8-fp16" else 0)


def read_layers(trt, plan):
    """Read an engine's table of layers, which counts as that of TensorRT for RTX does."""
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(plan)
    inspector = engine.create_engine_inspector()
    text = str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    print(text)
    return RtxEngine(plan, trt.__version__, tuple(map(_layer, json.loads(text)["Layers"])))


def _layer(layer):
    assert isinstance(layer, dict), f"the engine was not built to be detailed: only '{layer}'"
    tensors = json.dumps([layer.get("Inputs", []), layer.get("Constants", [])])
    types = re.findall(r'"(?:Format/)?Datatype": "([^"]*)"', tensors)
    return FusedLayer(
        name=str(layer["Name"]),
        kind=str(layer["LayerType"]),
        types=frozenset(map(_type, types)),
        nodes=tuple(re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(layer.get("Metadata", "")))),
    )


def _type(text):
    """Return ``Half`` for ``Half`` and for ``Row major linear FP16``."""
    patterns = {"Int8": "int8", "Half": "half|fp16", "Float": "float|fp32"}
    return next((n for n, found in patterns.items() if re.search(found, text, re.I)), text)

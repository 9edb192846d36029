"""NVIDIA's compiler on the typed graphs of ViT-B/16: it takes them, and fuses what matters.

TensorRT for RTX compiles without a GPU. Random weights are enough: fusion looks at structure.
"""

from functools import cache
from importlib import import_module
from pathlib import Path

import onnx_ir as ir
import pytest

from tests.helpers.toy_graphs import TOWERS, toy_graph
from tests.helpers.vit_b16 import PROFILES, export_vit_b16, int8_gemms, vit_b16_variant
from upperson_calibration.graph import TowerGraph
from upperson_export.engines import RtxEngine, build_rtx_engine, parse_layers, rtx_target
from upperson_export.graphs import build_variant
from upperson_export.lint import lint
from upperson_export.variants import VariantName
from upperson_rt.errors import BackendError, IntegrityError, UsageError
from upperson_rt.tensorrt.builder import InputProfile
from upperson_rt.towers import Tower

pytestmark = [
    pytest.mark.timeout(300),  # Two exports of ViT-B/16, four builds.
    pytest.mark.usefixtures("toy_graphs"),
]

LAYERS = 3
"""One block after the embedding, one after a block, and the last one. ViT-B/16 has twelve, which
differ in nothing that the compiler looks at, and to export them takes 2.7 GB."""

TOY_PROFILE = InputProfile("image", (1, 48, 32, 3), (8, 48, 32, 3), (32, 48, 32, 3))


def _why_not() -> str:
    try:
        import_module("tensorrt_rtx")
    except (ImportError, OSError) as error:
        return f"TensorRT for RTX does not load ({error}): run  pip install tensorrt-rtx-cu13"
    return ""


needs_rtx = pytest.mark.skipif(bool(_why_not()), reason=_why_not())
without_rtx = pytest.mark.skipif(not _why_not(), reason="TensorRT for RTX is installed")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[Tower, TowerGraph]:
    """Export both towers once; files, so that only one is in memory at a time."""
    return export_vit_b16(tmp_path_factory.mktemp("vit_b16"), LAYERS)


def build(
    model: ir.Model, folder: Path, profile: InputProfile, capability: str = "8.6"
) -> RtxEngine:
    ir.save(model, folder / "tower.onnx")
    return build_rtx_engine(folder / "tower.onnx", profile, capability)


def compiled(
    graphs: dict[Tower, TowerGraph], kind: Tower, variant: VariantName, folder: Path
) -> RtxEngine:
    model = vit_b16_variant(graphs[kind], variant)
    assert lint(model) == []
    engine = build(model, folder, PROFILES[kind])
    print(
        f"{kind} {variant}: {len(engine.fused_attentions())} fused attentions, "
        f"{len(engine.int8_gemms())} int8 GEMMs, {len(engine.layers)} kernels, "
        f"TensorRT for RTX {engine.version}"
    )
    return engine


@needs_rtx
@pytest.mark.parametrize("kind", TOWERS)
def test_attention_of_the_fp16_graph_is_fused(
    graphs: dict[Tower, TowerGraph], kind: Tower, tmp_path: Path
) -> None:
    engine = compiled(graphs, kind, "fp16", tmp_path)
    # That of the last block has one query row, and no kernel for it.
    assert len(engine.fused_attentions()) >= LAYERS - 1
    assert not engine.int8_gemms()
    assert len(engine.content) > graphs[kind].file.stat().st_size / 2 * 0.95  # All weights, halved.


@needs_rtx
@pytest.mark.parametrize("kind", TOWERS)
def test_attention_and_all_block_linears_of_the_int8_graph_are_fused(
    graphs: dict[Tower, TowerGraph], kind: Tower, tmp_path: Path
) -> None:
    engine = compiled(graphs, kind, "int8-fp16", tmp_path)
    assert len(engine.fused_attentions()) >= LAYERS - 1
    gemms = engine.int8_gemms()
    assert len(gemms) == int8_gemms(LAYERS)
    covered = {node for layer in gemms for node in layer.nodes if node.endswith("/MatMul")}
    assert covered == {
        f"blocks.{block}.{module}/MatMul"
        for block in range(LAYERS)
        for module in (
            "attention.q", "attention.k", "attention.v", "attention.out", "mlp.fc1", "mlp.fc2",
        )
    }  # fmt: skip
    projections = [layer for layer in gemms if "blocks.1.attention.q/MatMul" in layer.nodes]
    assert {"blocks.1.attention.k/MatMul", "blocks.1.attention.v/MatMul"} <= set(
        projections[0].nodes
    ), "queries, keys and values are one GEMM"


@cache
def toy_fp16() -> ir.Model:
    return build_variant(toy_graph("image"), "fp16")


@needs_rtx
def test_one_build_makes_one_engine(tmp_path: Path) -> None:
    first = build(toy_fp16(), tmp_path, TOY_PROFILE, "8.9")
    assert first.content == build(toy_fp16(), tmp_path, TOY_PROFILE, "8.9").content
    assert first.content != build(toy_fp16(), tmp_path, TOY_PROFILE, "7.5").content
    assert first.version
    assert len(first.layers) > 10


@needs_rtx
def test_a_graph_that_the_linter_finds_fault_with_is_refused_by_the_compiler(
    tmp_path: Path,
) -> None:
    broken = toy_fp16().clone()
    add = next(node for node in broken.graph if node.name == "blocks.0/Add_2")
    values = ir.convenience.create_value_mapping(broken.graph)
    add.replace_input_with(1, values["blocks.0.ln_1/LayerNormalization"])  # float32 beside float16
    assert {(finding.rule, finding.node) for finding in lint(broken)} == {
        ("mixed-types", "blocks.0/Add_2")
    }
    with pytest.raises(BackendError, match=r"TensorRT for RTX .* 'blocks\.0/Add_2' \(Add\)"):
        build(broken, tmp_path, TOY_PROFILE)


@needs_rtx
@pytest.mark.parametrize("capability", ["8.7", "9.0", "current"])
def test_a_gpu_it_does_not_compile_for_is_a_usage_error(capability: str) -> None:
    with pytest.raises(UsageError, match=r"8\.6.*12\.0.*upperson-rt compile"):
        rtx_target(capability)


@needs_rtx
def test_a_profile_that_does_not_fit_the_graph_is_refused(tmp_path: Path) -> None:
    wrong = InputProfile("image", (1, 40, 32, 3), (8, 48, 32, 3), (32, 48, 32, 3))
    with pytest.raises(IntegrityError, match=r"found inputs \{'image': \(-1, 48, 32, 3\)\}"):
        build(toy_fp16(), tmp_path, wrong)


@without_rtx
def test_a_missing_package_is_a_clear_error() -> None:
    with pytest.raises(BackendError, match="pip install tensorrt-rtx-cu13"):
        rtx_target("8.6")


def test_the_table_of_layers_is_read() -> None:
    tensor = "{{ Name: t, Dimensions: [-1,7], Datatype: {}, Format: (Linear) Row major }}"
    lines = [
        "Layers:",
        f"Name: _gemm_mha_v2_0, LayerType: kgen, Inputs: [ {tensor.format('Half')}], "
        f"Constants: [], Outputs: [ {tensor.format('Int8')}], TacticName: x_0x12, StreamId: 0, "
        "Metadata: [ONNX Layer: a/MatMul][ONNX Layer: a/Softmax]",
        f"Name: fc1_1, LayerType: gemm, Inputs: [ {tensor.format('Int8')}], "
        f"Constants: [ {tensor.format('Int8')}, {tensor.format('Float')}], Outputs: [], "
        "TacticName: , StreamId: 0, Metadata: [ONNX Layer: fc1/MatMul]",
        "Bindings:",
    ]
    engine = RtxEngine(b"", "1", tuple(parse_layers("\n".join(lines))))
    assert [layer.nodes for layer in engine.layers] == [("a/MatMul", "a/Softmax"), ("fc1/MatMul",)]
    assert [layer.types for layer in engine.layers] == [{"Half"}, {"Int8", "Float"}]
    assert [layer.name for layer in engine.fused_attentions()] == ["_gemm_mha_v2_0"]
    assert [layer.name for layer in engine.int8_gemms()] == ["fc1_1"]

"""NVIDIA's compiler on the typed graphs of ViT-B/16: it takes them, and fuses what matters.

TensorRT for RTX compiles without a GPU. Random weights are enough: fusion looks at structure.
"""

from functools import cache
from importlib import import_module

import onnx
import onnx_ir as ir
import pytest
import torch

from benchmarks.random_model import ModelSpec, random_model
from tests.helpers.alone import found_alone
from tests.helpers.refused import refused
from tests.helpers.toy_bases import shortened_base
from tests.helpers.toy_graphs import TOWERS, toy_graph
from tests.helpers.vit_b16 import PROFILES, export_vit_b16, int8_gemms, vit_b16_variant
from upperson_export.engines import build_rtx_engine, rtx_target
from upperson_export.fold import fold_image_tower
from upperson_export.graphs import build_variant, export_onnx
from upperson_export.lint import lint
from upperson_export.serving import planar_float_input
from upperson_rt.errors import BackendError, IntegrityError, UsageError
from upperson_tensorrt.builder import InputProfile

pytestmark = [
    pytest.mark.timeout(300),  # Two exports of ViT-B/16, four builds.
    pytest.mark.usefixtures("toy_graphs"),
]

LAYERS = 3
"""One block after the embedding, one after a block, and the last one. ViT-B/16 has twelve, which
differ in nothing that the compiler looks at, and to export them takes 2.7 GB."""

TOY_PROFILE = InputProfile("image", (1, 48, 32, 3), (8, 48, 32, 3), (32, 48, 32, 3))


def why_not():
    try:
        import_module("tensorrt_rtx")
    except (ImportError, OSError) as error:
        return f"TensorRT for RTX does not load ({error}): run  pip install tensorrt-rtx-cu13"
    return ""


@pytest.fixture
def rtx():
    """Skip a test where the compiler is not there; it is loaded only where tests need it."""
    if reason := why_not():
        pytest.skip(reason)


needs_rtx = pytest.mark.usefixtures("rtx")


def build(model, folder, profile, capability="8.6"):
    ir.save(model, folder / "tower.onnx")
    return build_rtx_engine(folder / "tower.onnx", profile, capability)


def compile_vit_b16(folder):
    """Export both towers, compile both variants, and report what the compiler made of them."""
    found = {}
    for kind, graph in export_vit_b16(folder, LAYERS).items():
        for variant in ("fp16", "int8-fp16"):
            model = vit_b16_variant(graph, variant)
            engine = build(model, folder, PROFILES[kind])
            found[f"{kind} {variant}"] = {
                "findings": [str(finding) for finding in lint(model)],
                "fused_attentions": len(engine.fused_attentions()),
                "int8_gemms": [layer.nodes for layer in engine.int8_gemms()],
                "engine_bytes": len(engine.content),
                "graph_bytes": graph.file.stat().st_size,
            }
    return found


@pytest.fixture(scope="module")
def vit_b16(shared_folder):
    """What the compiler made of ViT-B/16; that takes 0.5 GB."""
    if reason := why_not():
        pytest.skip(reason)
    return found_alone(shared_folder, compile_vit_b16)


@pytest.mark.parametrize("kind", TOWERS)
def test_attention_and_all_block_linears_of_the_int8_graph_are_fused(vit_b16, kind):
    half, int8 = (vit_b16[f"{kind} {variant}"] for variant in ("fp16", "int8-fp16"))
    for engine in (half, int8):
        assert engine["findings"] == []
        # Attention of the last block has one query row, and no kernel for it.
        assert engine["fused_attentions"] >= LAYERS - 1
    assert not half["int8_gemms"]
    assert half["engine_bytes"] > half["graph_bytes"] / 2 * 0.95  # All weights, halved.
    gemms = int8["int8_gemms"]
    assert len(gemms) == int8_gemms(LAYERS)
    covered = {node for nodes in gemms for node in nodes if node.endswith("/MatMul")}
    assert covered == {
        f"blocks.{block}.{module}/MatMul"
        for block in range(LAYERS)
        for module in (
            "attention.q", "attention.k", "attention.v", "attention.out", "mlp.fc1", "mlp.fc2",
        )
    }  # fmt: skip
    projections = [nodes for nodes in gemms if "blocks.1.attention.q/MatMul" in nodes]
    assert {"blocks.1.attention.k/MatMul", "blocks.1.attention.v/MatMul"} <= set(projections[0]), (
        "queries, keys and values are one GEMM"
    )


@needs_rtx
def test_rotary_embeddings_are_part_of_the_fused_attention(tmp_path, monkeypatch):
    """Of PE-Core-T's image tower, in which every block needs all rows."""
    clip = shortened_base("PE-Core-T-16-384", LAYERS, monkeypatch)
    tower = fold_image_tower(random_model(ModelSpec(), clip).eval())
    graph = export_onnx(
        tower, "image", tmp_path / "image.onnx",
        example=torch.zeros(3, 384, 128, 3, dtype=torch.uint8),
    )  # fmt: skip
    model = vit_b16_variant(graph, "int8-fp16")
    assert not lint(model)
    engine = build(model, tmp_path, PROFILES["image"])
    assert len(engine.fused_attentions()) == LAYERS
    assert len(engine.int8_gemms()) == 4 * (LAYERS + 1)  # The pool's, too.


@cache
def toy_fp16():
    return build_variant(toy_graph("image"), "fp16")


@needs_rtx
def test_the_planar_graph_of_deepstream_is_taken(tmp_path):
    """It is another product than TensorRT, but the nearest there is without a GPU."""
    onnx.save(planar_float_input(ir.to_proto(toy_fp16())), tmp_path / "planar.onnx")
    profile = InputProfile("image", (1, 3, 48, 32), (8, 3, 48, 32), (16, 3, 48, 32))
    assert build_rtx_engine(tmp_path / "planar.onnx", profile).content


@needs_rtx
def test_a_graph_that_the_linter_finds_fault_with_is_refused_by_the_compiler(tmp_path):
    broken = toy_fp16().clone()
    add = next(node for node in broken.graph if node.name == "blocks.0/Add_2")
    values = ir.convenience.create_value_mapping(broken.graph)
    add.replace_input_with(1, values["blocks.0.ln_1/LayerNormalization"])  # float32 beside float16
    assert {(finding.rule, finding.node) for finding in lint(broken)} == {
        ("mixed-types", "blocks.0/Add_2")
    }
    with pytest.raises(BackendError, match=r"blocks\.0/Add_2"):
        build(broken, tmp_path, TOY_PROFILE)


@needs_rtx
def test_another_gpu_and_a_profile_that_does_not_fit_are_refused(tmp_path):
    for capability in ("8.7", "9.0", "current"):
        with refused("capability_unsupported", UsageError, found=capability):
            rtx_target(capability)
    wrong = InputProfile("image", (1, 40, 32, 3), (8, 48, 32, 3), (32, 48, 32, 3))
    with pytest.raises(IntegrityError):
        build(toy_fp16(), tmp_path, wrong)


def test_a_missing_package_is_a_clear_error():
    if not why_not():
        pytest.skip("TensorRT for RTX is installed")
    with refused("extra_missing", BackendError, package="tensorrt_rtx"):
        rtx_target("8.6")

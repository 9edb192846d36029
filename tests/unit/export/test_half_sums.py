"""Sums in float16: the simulated worst case, and casts where a tower does not bear it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.toy_graphs import TOWERS, Array, amax_of, min_cosine, toy_graph, toy_inputs
from upperson_export.graphs import build_variant, open_simulated, with_safe_sums
from upperson_export.lint import lint
from upperson_export.passes.half import SUM_OF, FloatSums, half_products
from upperson_export.variants import VariantName
from upperson_rt.backends import open_backend
from upperson_rt.towers import Tower, run_tower

pytestmark = pytest.mark.usefixtures("toy_graphs")

each_tower = pytest.mark.parametrize("kind", TOWERS)


def product(weight: Array, folder: Path) -> Path:
    """A typed tower of one product: uint8 [N, K] times float16 [K, M]."""
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["x", "weight"], ["y"], "product"),
        helper.make_node("Cast", ["y"], ["image_embeds"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "tower",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", len(weight)])],
        [helper.make_tensor_value_info("image_embeds", TensorProto.FLOAT, ["N", len(weight[0])])],
        [numpy_helper.from_array(weight.astype(np.float16), "weight")],
    )
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 19)])
    onnx.save(onnx.shape_inference.infer_shapes(model), folder / "tower.onnx")
    return folder / "tower.onnx"


def toy_variant(kind: Tower, variant: VariantName, folder: Path) -> Path:
    fp32 = toy_graph(kind)
    path = folder / f"{kind}.onnx"
    ir.save(build_variant(fp32, variant, amax_of(fp32, toy_inputs(kind, 24))), path)
    return path


def simulated(path: Path, inputs: Array, *half_sums: str, kind: Tower = "image") -> Array:
    return run_tower(open_simulated(path, 1, half_sums), kind, inputs)


@pytest.mark.parametrize("length", [1, SUM_OF, 5 * SUM_OF + 3])
def test_the_sum_is_rounded_piece_by_piece(tmp_path: Path, length: int) -> None:
    rng = np.random.default_rng(0)
    # Whole numbers: what is summed exactly is exact in whatever order.
    weight = rng.integers(-9, 10, (length, 5))
    rows = rng.integers(0, 256, (4, length), dtype=np.uint8)
    path = product(weight, tmp_path)
    expected = np.zeros((4, 5), np.float16)
    for start in range(0, length, SUM_OF):
        piece = slice(start, start + SUM_OF)
        exact = rows[:, piece].astype(np.float32) @ weight[piece].astype(np.float32)
        expected = (expected.astype(np.float32) + exact).astype(np.float16)
    np.testing.assert_array_equal(simulated(path, rows, "product"), expected)
    exact = (rows.astype(np.float32) @ weight.astype(np.float32)).astype(np.float16)
    np.testing.assert_array_equal(simulated(path, rows), exact)
    assert np.array_equal(expected, exact) == (length <= SUM_OF)


def test_a_sum_that_overflows_on_the_way_gets_casts(tmp_path: Path) -> None:
    weight = np.repeat([[200.0, 100.0], [-200.0, 100.0], [1.0, -200.0]], 4 * SUM_OF, axis=0)
    rows = np.full((3, len(weight)), 255, np.uint8)
    path = product(weight, tmp_path)
    expected = run_tower(open_backend(path, "onnxruntime"), "image", rows)
    assert np.isfinite(simulated(path, rows)).all()
    assert not np.isfinite(simulated(path, rows, "product")).all()
    found = with_safe_sums(path, "image", rows, 0.999)
    assert found.float_sums == ("product",)
    assert found.cosine > found.min_cosine == 0.9995
    assert half_products(ir.load(path).graph) == []
    again = run_tower(open_backend(path, "onnxruntime"), "image", rows)
    np.testing.assert_array_equal(again, expected)
    np.testing.assert_array_equal(simulated(path, rows), expected)


@each_tower
@pytest.mark.parametrize("variant", ["fp16", "int8-fp16"])
def test_a_tower_that_bears_them_stays_as_it_is(
    kind: Tower, variant: VariantName, tmp_path: Path
) -> None:
    path = toy_variant(kind, variant, tmp_path)
    before = path.read_bytes()
    found = with_safe_sums(path, kind, toy_inputs(kind), 0.999)
    assert path.read_bytes() == before
    assert found.float_sums == ()
    assert 0.9995 < found.cosine < 1 - 1e-8, "nothing was simulated"


@each_tower
def test_one_that_does_not_gets_casts_where_sums_err_most(kind: Tower, tmp_path: Path) -> None:
    path, inputs = toy_variant(kind, "fp16", tmp_path), toy_inputs(kind, 4)
    products = half_products(ir.load(path).graph)
    as_run = run_tower(open_backend(path, "onnxruntime"), kind, inputs)
    before = min_cosine(simulated(path, inputs, *products, kind=kind), as_run)
    found = with_safe_sums(path, kind, inputs, before)  # It asks for half the loss.
    assert 0 < len(found.float_sums) <= len(products)
    assert set(found.float_sums) <= set(products)
    assert found.cosine > before
    changed = ir.load(path)
    assert lint(changed) == []
    assert set(half_products(changed.graph)) == set(products) - set(found.float_sums)
    # What ONNX Runtime makes of the file is the same: it sums in float32 anyway.
    again = run_tower(open_backend(path, "onnxruntime"), kind, inputs)
    assert min_cosine(again, as_run) > 1 - 1e-6


def test_products_of_int8_are_none_of_float16(tmp_path: Path) -> None:
    half = half_products(ir.load(toy_variant("image", "fp16", tmp_path)).graph)
    quantized = half_products(ir.load(toy_variant("image", "int8-fp16", tmp_path)).graph)
    assert not any(name.endswith(("fc1/MatMul", "fc2/MatMul")) for name in quantized)
    assert {name for name in quantized if "attention" in name} <= set(half)
    assert len(quantized) < len(half)


def test_casts_stand_around_the_product_alone(tmp_path: Path) -> None:
    model = ir.load(product(np.ones((3, 2)), tmp_path))
    FloatSums(["product"])(model)
    node = next(node for node in model.graph if node.name == "product")
    assert [before.op_type for before in node.predecessors()] == ["Cast", "Cast"]
    assert [after.op_type for after in node.successors()] == ["Cast"]
    assert model.graph.initializers["weight"].dtype == ir.DataType.FLOAT16, "it is stored as small"

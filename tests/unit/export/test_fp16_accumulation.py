"""Fp16 accumulation: the simulated worst case, and casts where a tower loses too much."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper, parser

from tests.helpers.toy_graphs import TOWERS, amax_of, min_cosine, toy_graph, toy_inputs
from upperson_export.graphs import build_variant, make_overflow_safe, open_simulated
from upperson_export.lint import lint
from upperson_export.passes.half import PRODUCTS_A_ROUNDING, fp16_products
from upperson_rt.backends import open_backend
from upperson_rt.towers import run_tower

pytestmark = pytest.mark.usefixtures("toy_graphs")

each_tower = pytest.mark.parametrize("kind", TOWERS)


def product(weight, folder):
    """A typed tower of one product: uint8 [N, K] times float16 [K, M]."""
    weight = np.asarray(weight, np.float16)
    inputs, outputs = weight.shape
    model = parser.parse_model(f"""<ir_version: 9, opset_import: ["" : 19]>
    tower (uint8[N, {inputs}] image) => (float[N, {outputs}] image_embeds) {{
        x = Cast<to = 10>(image)
        y = MatMul(x, weight)
        image_embeds = Cast<to = 1>(y)
    }}""")
    model.graph.node[1].name = "product"
    model.graph.initializer.append(numpy_helper.from_array(weight, "weight"))
    onnx.save(onnx.shape_inference.infer_shapes(model), folder / "tower.onnx")
    return folder / "tower.onnx"


def toy_variant(kind, variant, folder):
    fp32 = toy_graph(kind)
    path = folder / f"{kind}.onnx"
    ir.save(build_variant(fp32, variant, amax_of(fp32, toy_inputs(kind, 24))), path)
    return path


def simulated(path, inputs, *accumulated, kind="image"):
    return run_tower(open_simulated(path, 1, accumulated), kind, inputs)


def as_run(path, kind, inputs):
    return run_tower(open_backend(path, "onnxruntime"), kind, inputs)


@pytest.mark.parametrize("length", [1, PRODUCTS_A_ROUNDING, 5 * PRODUCTS_A_ROUNDING + 3])
def test_the_sum_is_rounded_piece_by_piece(tmp_path, length):
    rng = np.random.default_rng(0)
    # Whole numbers: exact sums do not depend on the order.
    weight = rng.integers(-9, 10, (length, 5))
    rows = rng.integers(0, 256, (4, length), dtype=np.uint8)
    path = product(weight, tmp_path)
    expected = np.zeros((4, 5), np.float16)
    for start in range(0, length, PRODUCTS_A_ROUNDING):
        piece = slice(start, start + PRODUCTS_A_ROUNDING)
        exact = rows[:, piece].astype(np.float32) @ weight[piece].astype(np.float32)
        expected = (expected.astype(np.float32) + exact).astype(np.float16)
    np.testing.assert_array_equal(simulated(path, rows, "product"), expected)
    exact = (rows.astype(np.float32) @ weight.astype(np.float32)).astype(np.float16)
    np.testing.assert_array_equal(simulated(path, rows), exact)
    assert np.array_equal(expected, exact) == (length <= PRODUCTS_A_ROUNDING)


def test_a_sum_that_overflows_on_the_way_gets_casts(tmp_path):
    pieces = [[200.0, 100.0], [-200.0, 100.0], [1.0, -200.0]]
    weight = np.repeat(pieces, 4 * PRODUCTS_A_ROUNDING, axis=0)
    rows = np.full((3, len(weight)), 255, np.uint8)
    path = product(weight, tmp_path)
    expected = as_run(path, "image", rows)
    assert np.isfinite(simulated(path, rows)).all()
    assert not np.isfinite(simulated(path, rows, "product")).all()
    found = make_overflow_safe(path, "image", rows, 0.999)
    assert found.float_sums == ("product",)
    assert found.cosine > found.min_cosine == 0.9995
    assert fp16_products(ir.load(path).graph) == []
    np.testing.assert_array_equal(as_run(path, "image", rows), expected)
    np.testing.assert_array_equal(simulated(path, rows), expected)


@each_tower
@pytest.mark.parametrize("variant", ["fp16", "int8-fp16"])
def test_an_overflow_safe_tower_stays_as_it_is(kind, variant, tmp_path):
    path = toy_variant(kind, variant, tmp_path)
    before = path.read_bytes()
    found = make_overflow_safe(path, kind, toy_inputs(kind), 0.999)
    assert path.read_bytes() == before
    assert found.float_sums == ()
    assert 0.9995 < found.cosine < 1 - 1e-8, "nothing was simulated"


@each_tower
def test_another_one_gets_casts_where_sums_err_most(kind, tmp_path):
    path, inputs = toy_variant(kind, "fp16", tmp_path), toy_inputs(kind, 4)
    products = fp16_products(ir.load(path).graph)
    expected = as_run(path, kind, inputs)
    before = min_cosine(simulated(path, inputs, *products, kind=kind), expected)
    found = make_overflow_safe(path, kind, inputs, before)  # Half the loss is allowed.
    assert 0 < len(found.float_sums) <= len(products)
    assert set(found.float_sums) <= set(products)
    assert found.cosine > before
    changed = ir.load(path)
    assert lint(changed) == []
    assert set(fp16_products(changed.graph)) == set(products) - set(found.float_sums)
    # ONNX Runtime accumulates in float32 anyway.
    assert min_cosine(as_run(path, kind, inputs), expected) > 1 - 1e-6

"""Every variant against float32: in ONNX Runtime, in OpenVINO, and in strict float16 arithmetic.

ONNX Runtime has no float16 kernels on a CPU and computes in float32 between Casts. What a GPU would
do is seen in ONNX's reference implementation, which rounds the result of every node.
"""

from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from tests.helpers.refused import refused
from tests.helpers.stress_models import with_loud_channels, with_prefix_scale, with_stream_outlier
from tests.helpers.toy_clip import normalised, toy_ids, toy_model, toy_pixels
from tests.helpers.toy_graphs import (
    FOLD,
    TOWERS,
    Array,
    amax_of,
    graph_of,
    min_cosine,
    proto_of,
    run_graph,
    toy_graph,
    toy_inputs,
)
from upperson_calibration.ranges import estimate, largest_values, observe
from upperson_calibration.sensitivity import rank_by_sensitivity
from upperson_export.graphs import build_variant, simulate_half
from upperson_export.parity.subjects import BackendChoice, open_subject
from upperson_export.passes.half import LIMIT
from upperson_rt.backends import open_backend
from upperson_rt.errors import InputError
from upperson_rt.tokenizer import token_lengths
from upperson_rt.towers import run_tower

MIN_COSINE = {"fp16": 0.99999, "int8": 0.998, "int8-fp16": 0.998}
"""Measured on the toy: 0.9999991, 0.9988 and 0.9988; its Linears are short, so int8 errs more."""

pytestmark = pytest.mark.usefixtures("toy_graphs")

each_tower = pytest.mark.parametrize("kind", TOWERS)
each_variant = pytest.mark.parametrize("variant", list(MIN_COSINE))


@cache
def variant_of(kind, variant):
    fp32 = toy_graph(kind)
    return proto_of(build_variant(fp32, variant, amax_of(fp32, toy_inputs(kind, 24))))


def exported(model, kind):
    return graph_of(FOLD[kind](model), kind)


def simulated(typed):
    return proto_of(simulate_half(ir.from_proto(typed)))


def half_arithmetic(model, inputs):
    # The sigmoid computes both of its forms and keeps the one that did not overflow.
    with np.errstate(over="ignore", invalid="ignore"):
        found: Array = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: inputs})[0]
    return found


@each_tower
@each_variant
def test_onnxruntime_runs_every_variant(kind, variant):
    inputs = toy_inputs(kind, 9)
    found = run_graph(variant_of(kind, variant), inputs)[0]
    expected = run_graph(toy_graph(kind), inputs)[0]
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert min_cosine(found, expected) > MIN_COSINE[variant]
    assert min_cosine(found, expected) < 1 - 1e-8, "it is the float32 graph"
    few = [toy_pixels(2)] if kind == "image" else [toy_ids([2]), toy_ids([77, 3, 60])]
    for inputs in few:  # A text may have any length, and a batch any size.
        expected = run_graph(toy_graph(kind), inputs.numpy())[0]
        assert min_cosine(run_graph(variant_of(kind, variant), inputs.numpy())[0], expected) > 0.998


@each_tower
@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_openvino_runs_the_variants_for_cpus(kind, variant, tmp_path):
    pytest.importorskip("openvino", reason="openvino is not installed: pip install openvino")
    path = tmp_path / "tower.onnx"
    onnx.save(variant_of(kind, variant), path)
    for count in (1, 9):
        inputs = toy_inputs(kind, count)
        found = run_tower(open_backend(path, "openvino", threads=1), kind, inputs)
        assert min_cosine(found, run_graph(toy_graph(kind), inputs)[0]) > MIN_COSINE.get(
            variant, 0.99999
        )


def outlier(magnitude):
    def put(model):
        images, ids = normalised(model, toy_pixels(9)), toy_ids([14] * 9).long()
        return with_stream_outlier(model, images, ids, magnitude=magnitude)

    return put


@each_tower
@pytest.mark.parametrize("variant", ["fp16", "int8-fp16"])
def test_strict_float16_is_close_and_simulated_float16_rounds_like_it(kind, variant):
    inputs = toy_inputs(kind)
    typed = variant_of(kind, variant)
    strict, simulated_half = half_arithmetic(typed, inputs), run_graph(simulated(typed), inputs)[0]
    assert min_cosine(strict, run_graph(toy_graph(kind), inputs)[0]) > MIN_COSINE[variant]
    # With int8, a value near the middle of two steps may fall to either side.
    assert min_cosine(simulated_half, strict) > (0.99999 if variant == "fp16" else 0.999)
    # What ONNX Runtime makes of the typed graph itself is float32.
    assert not np.array_equal(simulated_half, run_graph(typed, inputs)[0])


@each_tower
def test_an_overflow_that_onnxruntime_hides_shows_in_the_simulation(kind):
    fp32 = exported(with_loud_channels(toy_model(), largest=2.0**18), kind)
    inputs = toy_inputs(kind)
    trusting = proto_of(build_variant(fp32, "fp16", largest={}))
    assert np.isfinite(run_graph(trusting, inputs)[0]).all()
    assert not np.isfinite(run_graph(simulated(trusting), inputs)[0]).any()


@each_tower
@pytest.mark.parametrize(
    ("change", "floor"),
    [(outlier(1000.0), 0.9998), (lambda model: with_prefix_scale(model, 100.0), 0.99999)],
    ids=["stream outliers of 1000", "S 100"],
)
def test_float16_holds_what_clip_does_to_numbers(kind, change, floor):
    fp32 = exported(change(toy_model()), kind)
    inputs = toy_inputs(kind)
    found = half_arithmetic(proto_of(build_variant(fp32, "fp16")), inputs)
    assert min_cosine(found, run_graph(fp32, inputs)[0]) > floor


@each_tower
def test_what_float16_cannot_hold_stays_float32(kind):
    fp32 = exported(with_prefix_scale(toy_model(), 1e6), kind)
    inputs = toy_inputs(kind)
    largest = largest_values(fp32, inputs, batch_size=5, threads=1)
    assert max(largest.values()) > LIMIT
    with refused("constant_beyond_float16", InputError):
        build_variant(fp32, "fp16")
    fp16 = proto_of(build_variant(fp32, "fp16", largest=largest))
    found = half_arithmetic(fp16, inputs)
    assert min_cosine(found, run_graph(fp32, inputs)[0]) > 0.99999
    # Only the attention over the large values is kept, not the whole tower.
    half_weights = [item for item in fp16.graph.initializer if item.name.endswith("weight.fp16")]
    assert len(half_weights) > 10


@each_tower
def test_largest_values_are_those_of_the_tensors(kind):
    fp32, inputs = toy_graph(kind), toy_inputs(kind)
    if kind == "text":
        inputs = inputs[:, : token_lengths(inputs).max()]  # What a batch is padded to.
    largest = largest_values(fp32, inputs, batch_size=len(inputs), threads=1)
    for name, amax in amax_of(fp32, inputs).items():
        # Moved tensors are left out; their sources are there.
        assert name not in largest or largest[name] == pytest.approx(amax, rel=1e-5)
    assert len(largest) > 50
    with refused("no_samples", InputError):
        largest_values(fp32, inputs[:0])


def test_a_cpu_compares_what_float16_does_to_a_typed_variant(tmp_path):
    exact, paths = toy_graph("image"), {}
    for kind in TOWERS:
        paths[kind] = tmp_path / f"{kind}.fp16.onnx"
        ir.save(build_variant(toy_graph(kind), "fp16"), paths[kind])
    subject, _ = open_subject("fp16", paths, BackendChoice("onnxruntime", "cpu"), threads=1)
    assert subject.backend.endswith("on cpu, float16 simulated")
    images = toy_inputs("image")
    expected, computed_in_float32 = (
        run_graph(model, images)[0] for model in (exact, onnx.load(paths["image"]))
    )
    found = subject.run("image", images)
    # Rounded weights alone are closer than rounded weights and results.
    assert min_cosine(found, expected) > 0.999
    assert np.abs(found - expected).max() > 1.2 * np.abs(computed_in_float32 - expected).max()


def test_the_loudest_linears_are_the_most_sensitive_and_lose_as_much_alone_in_int8(tmp_path):
    graph = exported(with_loud_channels(toy_model(), blocks=[1]), "image")
    inputs, tests = toy_pixels(32).numpy(), toy_pixels(24, seed=7).numpy()
    amax = estimate(observe(graph, inputs, threads=1), "min-max")
    texts = np.random.default_rng(0).normal(size=(20, 24)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    ranking = rank_by_sensitivity(graph, amax, tests, texts, threads=1)
    assert {layer.node for layer in ranking[:2]} <= {
        "blocks.1.attention.kv/MatMul", "blocks.1.attention.q/MatMul", "blocks.1.mlp.fc1/MatMul"
    }  # fmt: skip
    keep = [layer.node for layer in ranking[1:]]
    ir.save(build_variant(graph, "int8", amax, keep), tmp_path / "one.onnx")
    exact, alone = (
        run_tower(open_backend(file, "onnxruntime", threads=1), "image", tests)
        for file in (graph.file, tmp_path / "one.onnx")
    )
    loss = 1 - float((alone * exact).sum(axis=1).mean())
    assert loss == pytest.approx(ranking[0].cosine_loss, rel=0.1)

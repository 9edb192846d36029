"""INT8 of models with outliers: without smoothing, with it, and one Linear at a time."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from tests.helpers.stress_models import with_loud_channels
from tests.helpers.toy_clip import toy_model, toy_pixels
from tests.helpers.toy_graphs import graph_of
from upperson_calibration.ranges import estimate, observe
from upperson_calibration.sensitivity import rank_by_sensitivity
from upperson_calibration.smoothing import choose_smoothing
from upperson_export.fold import fold_image_tower, smooth
from upperson_export.graphs import build_variant
from upperson_rt.backends import open_backend
from upperson_rt.towers import run_tower

pytestmark = pytest.mark.usefixtures("toy_graphs")

CALIBRATION = toy_pixels(32).numpy()
TEST = toy_pixels(24, seed=7).numpy()


def embed(path):
    return run_tower(open_backend(path, "onnxruntime", threads=1), "image", TEST)


def int8_loss(graph, folder, exact):
    """Return 1 - mean cosine of the int8 image tower to the float32 one."""
    amax = estimate(observe(graph, CALIBRATION, threads=1), "min-max")
    ir.save(build_variant(graph, "int8", amax), folder / "int8.onnx")
    return 1 - float((embed(folder / "int8.onnx") * exact).sum(axis=1).mean())


def test_loud_channels_ruin_plain_int8_and_smoothing_restores_it(tmp_path):
    model = toy_model()
    quiet = fold_image_tower(model)
    loud = fold_image_tower(with_loud_channels(model))
    with torch.no_grad():
        exact = quiet(torch.from_numpy(TEST)).numpy()
        np.testing.assert_allclose(loud(torch.from_numpy(TEST)).numpy(), exact, atol=1e-5)
    quiet_loss = int8_loss(graph_of(quiet, "image"), tmp_path, exact)
    loud_graph = graph_of(loud, "image")
    loud_loss = int8_loss(loud_graph, tmp_path, exact)
    found = choose_smoothing(loud_graph, observe(loud_graph, CALIBRATION, threads=1))
    factors = {site: item.factors for site, item in found.items()}
    smoothed = graph_of(smooth(loud, factors), "image")
    smoothed_loss = int8_loss(smoothed, tmp_path, exact)
    assert loud_loss > 30 * quiet_loss
    assert smoothed_loss < 1.5 * quiet_loss
    np.testing.assert_allclose(embed(smoothed.file), exact, atol=1e-5)


def test_the_loud_linears_are_the_most_sensitive_ones(tmp_path):
    graph = graph_of(fold_image_tower(with_loud_channels(toy_model(), blocks=[1])), "image")
    amax = estimate(observe(graph, CALIBRATION, threads=1), "min-max")
    texts = np.random.default_rng(0).normal(size=(20, 24)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    ranking = rank_by_sensitivity(graph, amax, TEST, texts, threads=1)
    assert {layer.node for layer in ranking[:2]} <= {
        "blocks.1.attention.kv/MatMul", "blocks.1.attention.q/MatMul", "blocks.1.mlp.fc1/MatMul"
    }  # fmt: skip
    exact = embed(graph.file)
    alone = {}
    for layer in (ranking[0], ranking[-1]):
        keep = [other.node for other in ranking if other.node != layer.node]
        int8 = tmp_path / "one.onnx"
        ir.save(build_variant(graph, "int8", amax, keep), int8)
        alone[layer.node] = 1 - float((embed(int8) * exact).sum(axis=1).mean())
    # The sensitivity of a Linear is the loss of the graph with it alone in int8.
    assert alone[ranking[0].node] == pytest.approx(ranking[0].cosine_loss, rel=0.1)
    assert alone[ranking[-1].node] < alone[ranking[0].node]

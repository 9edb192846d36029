"""INT8 of models with outliers: without smoothing, with it, and one Linear at a time."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from tests.helpers.stress_models import (
    with_loud_channels,
    with_prefix_scale,
    with_stream_outlier,
)
from tests.helpers.toy_clip import normalised, toy_ids, toy_model, toy_pixels
from tests.helpers.toy_graphs import graph_of
from upperson.model.encoder import UPPerson
from upperson_calibration.graph import TowerGraph
from upperson_calibration.ranges import estimate, observe
from upperson_calibration.sensitivity import rank_by_damage
from upperson_calibration.smoothing import choose_smoothing
from upperson_export.fold import fold_image_tower, smooth
from upperson_export.graphs import build_variant
from upperson_rt.backends import open_backend
from upperson_rt.towers import run_tower

pytestmark = pytest.mark.usefixtures("toy_graphs")

CALIBRATION = toy_pixels(32).numpy()
TEST = toy_pixels(24, seed=7).numpy()


def embed(path: Path) -> NDArray[np.float32]:
    return run_tower(open_backend(path, "onnxruntime", threads=1), "image", TEST)


def int8_loss(graph: TowerGraph, folder: Path, exact: NDArray[np.float32]) -> float:
    """Return 1 - mean cosine of the int8 image tower to the float32 one."""
    amax = estimate(observe(graph, CALIBRATION, threads=1), "min-max")
    ir.save(build_variant(graph, "int8", amax), folder / "int8.onnx")
    return 1 - float((embed(folder / "int8.onnx") * exact).sum(axis=1).mean())


def test_loud_channels_ruin_plain_int8_and_smoothing_restores_it(tmp_path: Path) -> None:
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


def test_the_loud_linears_are_found_to_be_the_harmful_ones(tmp_path: Path) -> None:
    graph = graph_of(fold_image_tower(with_loud_channels(toy_model(), blocks=[1])), "image")
    amax = estimate(observe(graph, CALIBRATION, threads=1), "min-max")
    texts = np.random.default_rng(0).normal(size=(20, 24)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    ranking = rank_by_damage(graph, amax, TEST, texts, threads=1)
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
    # What was predicted for a Linear is what the graph with it alone in int8 does.
    assert alone[ranking[0].node] == pytest.approx(ranking[0].cosine_loss, rel=0.1)
    assert alone[ranking[-1].node] < alone[ranking[0].node]


def adapter_inputs(model: UPPerson) -> list[float]:
    found: list[float] = []
    handles = [
        module.register_forward_pre_hook(
            lambda _, inputs: found.append(float(inputs[0].abs().max()))
        )
        for name, module in model.image.named_modules()
        if name.endswith(("adapter_attn", "adapter_mlp"))
    ]
    with torch.no_grad():
        model.encode_image(normalised(model, toy_pixels(4)))
    for handle in handles:
        handle.remove()
    return found


def test_a_stream_outlier_reaches_adapters_and_leaves_the_model_usable() -> None:
    model = toy_model()
    pixels, ids = normalised(model, toy_pixels(16)), toy_ids([9] * 8).long()
    changed = with_stream_outlier(model, pixels, ids)
    assert max(adapter_inputs(model)) < 50
    assert [value > 900 for value in adapter_inputs(changed)] == [False, False, True, True]
    with torch.no_grad():
        for before, after in (
            (model.encode_image(pixels), changed.encode_image(pixels)),
            (model.encode_text(ids), changed.encode_text(ids)),
        ):
            assert (before * after).sum(dim=1).mean() > 0.95


def test_the_prefix_scale_reaches_the_folded_values() -> None:
    model = toy_model()
    before = fold_image_tower(model).get_parameter("blocks.0.attention.prefix_v")
    scaled = fold_image_tower(with_prefix_scale(model, 100.0))
    old = model.image.blocks[0].prefix.scale.detach()
    torch.testing.assert_close(
        scaled.get_parameter("blocks.0.attention.prefix_v"), before * (100 / old)
    )

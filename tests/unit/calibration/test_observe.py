"""Streaming activations of a float32 graph, against the torch tower it was made from."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from tests.helpers.toy_clip import toy_ids, toy_model, toy_pixels
from upperson_calibration.block_linears import block_linears, weights_of
from upperson_calibration.observe import KEPT_ROWS, observe
from upperson_export.fold import fold_image_tower, fold_text_tower
from upperson_export.graphs import export_onnx
from upperson_rt.errors import InputError

pytestmark = pytest.mark.timeout(240)

MODULES = [
    "blocks.0.attention.qkv", "blocks.0.attention.out", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2",
    "blocks.1.attention.kv", "blocks.1.attention.q", "blocks.1.attention.out", "blocks.1.mlp.fc1",
    "blocks.1.mlp.fc2",
]  # fmt: skip
LENGTHS = [4, 9, 6, 14, 5, 5, 21, 8, 3]


@dataclass
class Tower:
    graph: Path
    module: torch.nn.Module
    inputs: NDArray[Any]

    def inputs_of_linears(self) -> dict[str, list[NDArray[np.float32]]]:
        """Return what enters each block Linear, sample by sample without any padding."""
        found: dict[str, list[NDArray[np.float32]]] = {}
        handles = [
            module.register_forward_pre_hook(
                lambda _, x, name=name: found.setdefault(name, []).append(x[0][0].numpy())
            )
            for name, module in self.module.named_modules()
            if name in MODULES
        ]
        for row in self.inputs:
            if row.ndim == 1:
                row = row[: int(row.argmax()) + 1]
            with torch.no_grad():
                self.module(torch.from_numpy(row)[None])
        for handle in handles:
            handle.remove()
        return found


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tower]:
    folder = tmp_path_factory.mktemp("observe")
    model = toy_model()
    image, text = fold_image_tower(model), fold_text_tower(model)
    export_onnx(image, "image", folder / "image.onnx", example=toy_pixels(3))
    export_onnx(text, "text", folder / "text.onnx", example=toy_ids([4, 9]))
    return {
        "image": Tower(folder / "image.onnx", image, toy_pixels(9).numpy()),
        "text": Tower(folder / "text.onnx", text, toy_ids(LENGTHS).numpy()),
    }


@pytest.mark.parametrize("kind", ["image", "text"])
def test_block_linears_are_found_with_their_weights(towers: dict[str, Tower], kind: str) -> None:
    model = onnx.load(towers[kind].graph)
    linears = block_linears(model)
    assert sorted(linear.module for linear in linears) == sorted(MODULES)
    assert [linear.node for linear in linears] == [f"{linear.module}/MatMul" for linear in linears]
    weights = weights_of(model)
    assert set(weights) == set(MODULES)
    expected = towers[kind].module.get_parameter("blocks.0.mlp.fc1.weight").numpy()
    np.testing.assert_array_equal(weights["blocks.0.mlp.fc1"], expected)


@pytest.mark.parametrize("kind", ["image", "text"])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_maxima_and_counts_are_those_of_every_valid_token(
    towers: dict[str, Tower], kind: str, batch_size: int
) -> None:
    """Captions of different lengths share batches, so padding would show in counts and maxima."""
    tower = towers[kind]
    found = observe(tower.graph, tower.inputs, batch_size=batch_size, threads=1)
    expected = tower.inputs_of_linears()
    for linear in block_linears(onnx.load(tower.graph)):
        rows = np.concatenate(expected[linear.module])
        seen = found[linear.activation]
        np.testing.assert_allclose(seen.channel_max, np.abs(rows).max(axis=0), rtol=1e-4, atol=1e-5)
        assert seen.amax == seen.channel_max.max()
        for half in (0, 1):
            maxima = np.abs(np.concatenate(expected[linear.module][half::2])).max(axis=0)
            np.testing.assert_allclose(seen.half_max[half], maxima, rtol=1e-4, atol=1e-5)
        assert seen.histogram.bins()[2].sum() == rows.size


@pytest.mark.parametrize("kind", ["image", "text"])
def test_kept_rows_are_rows_of_valid_tokens_from_every_sample(
    towers: dict[str, Tower], kind: str
) -> None:
    tower = towers[kind]
    found = observe(tower.graph, tower.inputs, batch_size=4, threads=1)
    expected = tower.inputs_of_linears()
    for linear in block_linears(onnx.load(tower.graph)):
        samples = expected[linear.module]
        nearest = [
            min(range(len(samples)), key=lambda i: np.abs(samples[i] - row).sum(axis=1).min())
            for row in found[linear.activation].rows
        ]
        assert set(nearest) == set(range(len(samples)))
        for row, sample in zip(found[linear.activation].rows, nearest, strict=True):
            assert np.abs(samples[sample] - row).max(axis=1).min() < 1e-4
        for row, half in zip(
            found[linear.activation].rows, found[linear.activation].row_half, strict=True
        ):
            of_half = np.concatenate(samples[half::2])
            assert np.abs(of_half - row).max(axis=1).min() < 1e-4


def test_what_is_kept_does_not_grow_with_the_samples(towers: dict[str, Tower]) -> None:
    tower = towers["image"]
    few, many = (
        observe(tower.graph, toy_pixels(count).numpy(), batch_size=64, threads=1)
        for count in (KEPT_ROWS, 2 * KEPT_ROWS + 3)
    )
    for name, seen in many.items():
        assert len(seen.rows) == KEPT_ROWS
        assert seen.histogram.bins()[2].sum() > 2 * few[name].histogram.bins()[2].sum()
        # All that is held, to the byte.
        assert len(pickle.dumps(seen)) == len(pickle.dumps(few[name]))


def test_progress_counts_samples_and_nothing_is_left_behind(towers: dict[str, Tower]) -> None:
    tower = towers["text"]
    before = sorted(tower.graph.parent.iterdir())
    told: list[tuple[int, int]] = []
    observe(
        tower.graph,
        tower.inputs,
        batch_size=4,
        threads=1,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(4, 9), (8, 9), (9, 9)]
    assert sorted(tower.graph.parent.iterdir()) == before


def test_an_activation_that_is_not_finite_is_named(
    towers: dict[str, Tower], tmp_path: Path
) -> None:
    model = onnx.load(towers["image"].graph)
    for item in model.graph.initializer:
        if item.name == "blocks.0.mlp.fc1.weight":
            broken = numpy_helper.to_array(item).copy()
            broken[0, 0] = np.nan
            item.CopyFrom(numpy_helper.from_array(broken, item.name))
    onnx.save(model, tmp_path / "nan.onnx")
    with pytest.raises(InputError, match=r"nan\.onnx: the activation '.*' is not finite"):
        observe(tmp_path / "nan.onnx", towers["image"].inputs, threads=1)


def test_no_samples_and_no_block_linears_are_errors(
    towers: dict[str, Tower], tmp_path: Path
) -> None:
    tower = towers["image"]
    with pytest.raises(InputError, match="at least one sample"):
        observe(tower.graph, tower.inputs[:0])
    other = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(other), tmp_path / "other.onnx")
    with pytest.raises(InputError, match="no block Linear"):
        observe(tmp_path / "other.onnx", tower.inputs)

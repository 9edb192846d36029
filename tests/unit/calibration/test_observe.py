"""Streaming activations of a float32 graph, against the torch tower it was made from."""

import pickle
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from tests.helpers.refused import refused
from tests.helpers.toy_clip import toy_ids, toy_model, toy_pixels
from tests.helpers.toy_graphs import FOLD, toy_graph
from upperson_calibration.graph import TowerGraph, array_of
from upperson_calibration.ranges import KEPT_ROWS, observe
from upperson_rt.errors import InputError

pytestmark = pytest.mark.usefixtures("toy_graphs")

MODULES = [
    "blocks.0.attention.qkv", "blocks.0.attention.out", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2",
    "blocks.1.attention.kv", "blocks.1.attention.q", "blocks.1.attention.out", "blocks.1.mlp.fc1",
    "blocks.1.mlp.fc2",
]  # fmt: skip


def module_of(linear):
    return linear.weight.removesuffix(".weight")


LENGTHS = [4, 9, 6, 14, 5, 5, 21, 8, 3]


@dataclass
class Tower:
    graph: TowerGraph
    module: torch.nn.Module
    inputs: NDArray[Any]

    def inputs_of_linears(self):
        """Return what enters each block Linear, sample by sample without any padding."""
        found = {}
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
def towers():
    model = toy_model()
    return {
        "image": Tower(toy_graph("image"), FOLD["image"](model), toy_pixels(9).numpy()),
        "text": Tower(toy_graph("text"), FOLD["text"](model), toy_ids(LENGTHS).numpy()),
    }


@pytest.mark.parametrize("kind", ["image", "text"])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_maxima_and_counts_are_those_of_every_valid_token(towers, kind, batch_size):
    """Captions of different lengths share batches, so padding would show in counts and maxima."""
    tower = towers[kind]
    found = observe(tower.graph, tower.inputs, batch_size=batch_size, threads=1)
    expected = tower.inputs_of_linears()
    for linear in tower.graph.linears:
        rows = np.concatenate(expected[module_of(linear)])
        seen = found[linear.activation]
        np.testing.assert_allclose(seen.channel_max, np.abs(rows).max(axis=0), rtol=1e-4, atol=1e-5)
        assert seen.amax == seen.channel_max.max()
        for half in (0, 1):
            maxima = np.abs(np.concatenate(expected[module_of(linear)][half::2])).max(axis=0)
            np.testing.assert_allclose(seen.half_max[half], maxima, rtol=1e-4, atol=1e-5)
        assert seen.histogram.bins()[2].sum() == rows.size


@pytest.mark.parametrize("kind", ["image", "text"])
def test_kept_rows_are_rows_of_valid_tokens_from_every_sample(towers, kind):
    tower = towers[kind]
    before = sorted(tower.graph.file.parent.iterdir())
    calls = []
    found = observe(
        tower.graph, tower.inputs, batch_size=4, threads=1,
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    assert calls == [(4, 9), (8, 9), (9, 9)]
    assert sorted(tower.graph.file.parent.iterdir()) == before
    expected = tower.inputs_of_linears()
    for linear in tower.graph.linears:
        samples, seen = expected[module_of(linear)], found[linear.activation]
        nearest = set()
        for row, half in zip(seen.rows, seen.row_half, strict=True):
            distances = [np.abs(sample - row).max(axis=1).min() for sample in samples]
            nearest.add(int(np.argmin(distances)))
            assert min(distances[half::2]) < 1e-4
        assert nearest == set(range(len(samples)))


def test_what_is_kept_does_not_grow_with_the_samples(towers):
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


def test_an_activation_that_is_not_finite_and_no_samples_are_refused(towers, tmp_path):
    tower = towers["image"]
    with refused("no_samples", InputError):
        observe(tower.graph, tower.inputs[:0])
    model = tower.graph.load()
    weight = model.graph.initializers["blocks.0.mlp.fc1.weight"]
    broken = array_of(weight).copy()
    broken[0, 0] = np.nan
    weight.const_value = ir.tensor(broken, name=weight.name)
    ir.save(model, tmp_path / "nan.onnx")
    graph = replace(tower.graph, file=tmp_path / "nan.onnx")
    with refused("activation_not_finite", InputError):
        observe(graph, tower.inputs, threads=1)

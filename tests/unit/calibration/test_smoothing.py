"""The search for smoothing factors, on Linears made by hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from upperson_calibration.graph import BlockLinear, TowerGraph
from upperson_calibration.ranges import AbsHistogram, Observed
from upperson_calibration.smoothing import STEPS_PER_OCTAVE, choose_smoothing

WIDTH = 32


SITES = {"qkv": "ln_1", "q": "ln_1", "kv": "ln_1", "fc1": "ln_2", "fc2": None}


GraphOf = Callable[[dict[str, NDArray[np.float32]], dict[str, str]], TowerGraph]


@pytest.fixture
def graph_of(tmp_path: Path) -> GraphOf:
    def write(weights: dict[str, NDArray[np.float32]], inputs: dict[str, str]) -> TowerGraph:
        """Write a graph that holds weights, and describe it."""
        constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
        file = tmp_path / "linears.onnx"
        onnx.save(helper.make_model(helper.make_graph([], "linears", [], [], constants)), file)
        return TowerGraph(
            "image",
            file,
            tuple(BlockLinear(f"{name}/M", inputs[name], name, SITES[name]) for name in weights),
        )

    return write


def observed(rows: NDArray[np.float32]) -> Observed:
    half = np.arange(len(rows)) % 2
    maxima = [np.abs(rows[half == value]).max(axis=0) for value in (0, 1)]
    return Observed(AbsHistogram(), np.stack(maxima), rows, half)


def weight(seed: int, out: int = 48) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(WIDTH, out)).astype(np.float32)


def rows(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(200, WIDTH)).astype(np.float32)


def test_loud_channels_are_evened_out(graph_of: GraphOf) -> None:
    """Inputs 64 times as large, rows as much smaller: what factors exist for."""
    loud = np.ones(WIDTH, np.float32)
    loud[[3, 17]] = 64
    plain, stressed = rows(0), rows(0) * loud
    weights = {"fc1": weight(1)}
    inputs = {"fc1": "u"}
    graph = graph_of({name: w / loud[:, None] for name, w in weights.items()}, inputs)
    found = choose_smoothing(graph, {"u": observed(stressed)})
    assert list(found) == ["ln_2"]
    smoothing = found["ln_2"]
    quiet = choose_smoothing(graph_of(weights, inputs), {"u": observed(plain)})
    assert smoothing.error_before > 100 * quiet["ln_2"].error_before
    assert smoothing.error_after < 2 * quiet["ln_2"].error_before
    others = np.delete(smoothing.factors, [3, 17])
    np.testing.assert_allclose(smoothing.factors[[3, 17]] / np.median(others), 64, rtol=0.5)


def test_factors_lie_on_the_grid_that_a_file_stores(graph_of: GraphOf) -> None:
    stressed = rows(2) * np.geomspace(0.01, 100, WIDTH).astype(np.float32)
    graph = graph_of({"qkv": weight(3)}, {"qkv": "u"})
    smoothing = choose_smoothing(graph, {"u": observed(stressed)})["ln_1"]
    assert smoothing.alpha is not None
    np.testing.assert_array_equal(
        smoothing.factors, np.exp2(smoothing.exponents / STEPS_PER_OCTAVE).astype(np.float32)
    )
    assert abs(smoothing.exponents.mean()) < STEPS_PER_OCTAVE  # Magnitudes stay where they were.


def test_nothing_is_done_where_it_does_not_help(graph_of: GraphOf) -> None:
    """One row in int8 already: any factor only coarsens some weights."""
    exact = np.random.default_rng(0).integers(-127, 128, (200, WIDTH)).astype(np.float32)
    exact[:, 0] = 127
    exact[:2] = 127  # Both halves have the same maxima.
    whole = np.random.default_rng(1).integers(-127, 128, (WIDTH, 8)).astype(np.float32)
    whole[0] = 127
    graph = graph_of({"fc1": whole}, {"fc1": "u"})
    smoothing = choose_smoothing(graph, {"u": observed(exact)})["ln_2"]
    assert smoothing.alpha is None
    assert (smoothing.factors == 1).all()
    assert smoothing.error_after == smoothing.error_before


def test_q_and_kv_share_factors_and_fc2_has_none(graph_of: GraphOf) -> None:
    names = {
        "kv": "u",
        "q": "taken",
        "fc2": "gelu",
    }
    graph = graph_of({name: weight(index) for index, name in enumerate(names)}, names)
    every = rows(0) * np.geomspace(1, 30, WIDTH).astype(np.float32)
    seen = {"u": observed(every), "taken": observed(every[:5]), "gelu": observed(rows(1))}
    found = choose_smoothing(graph, seen)
    assert list(found) == ["ln_1"]
    assert found["ln_1"].error_after < found["ln_1"].error_before


def test_silent_channels_and_unread_rows_keep_factor_one(graph_of: GraphOf) -> None:
    silent = rows(4) * np.geomspace(1, 200, WIDTH).astype(np.float32)
    silent[:, 7] = 0
    unread = weight(5)
    unread[9] = 0
    graph = graph_of({"fc1": unread}, {"fc1": "u"})
    smoothing = choose_smoothing(graph, {"u": observed(silent)})["ln_2"]
    assert smoothing.alpha is not None
    assert smoothing.exponents[[7, 9]].tolist() == [0, 0]
    assert np.isfinite(smoothing.factors).all()


def test_alpha_is_judged_on_samples_that_did_not_set_the_factors(graph_of: GraphOf) -> None:
    """Channels that are quiet in one half and loud in the other: equalising them saturates."""
    unseen = rows(6)
    unseen[::2, :16] *= 0.02
    unseen[1::2, 16:] *= 0.02
    graph = graph_of({"fc1": weight(7)}, {"fc1": "u"})
    seen = observed(unseen)
    assert choose_smoothing(graph, {"u": seen})["ln_2"].alpha is None


def test_a_single_sample_is_enough(graph_of: GraphOf) -> None:
    alone = observed(rows(0) * np.geomspace(1, 30, WIDTH).astype(np.float32))
    alone.half_max[1] = 0
    alone.row_half[:] = 0
    graph = graph_of({"fc1": weight(7)}, {"fc1": "u"})
    smoothing = choose_smoothing(graph, {"u": alone})["ln_2"]
    assert smoothing.error_after < smoothing.error_before

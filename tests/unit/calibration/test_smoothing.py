"""The search for smoothing factors, on Linears made by hand."""

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from upperson_calibration.histogram import AbsHistogram
from upperson_calibration.observe import Observed
from upperson_calibration.smoothing import STEPS_PER_OCTAVE, choose_smoothing, site_of

WIDTH = 32


def model_of(weights: dict[str, NDArray[np.float32]], inputs: dict[str, str]) -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", [inputs[name], f"{name}.weight"], [f"{name}.out"], f"{name}/M")
        for name in weights
    ]
    constants = [
        numpy_helper.from_array(value, f"{name}.weight") for name, value in weights.items()
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, WIDTH])
        for name in dict.fromkeys(inputs.values())
    ]
    return helper.make_model(helper.make_graph(nodes, "linears", values, [], constants))


def observed(rows: NDArray[np.float32]) -> Observed:
    half = np.arange(len(rows)) % 2
    maxima = [np.abs(rows[half == value]).max(axis=0) for value in (0, 1)]
    return Observed(AbsHistogram(), np.stack(maxima), rows, half)


def weight(seed: int, out: int = 48) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(WIDTH, out)).astype(np.float32)


def rows(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(200, WIDTH)).astype(np.float32)


@pytest.mark.parametrize(
    ("module", "site"),
    [
        ("blocks.11.attention.qkv", "blocks.11.ln_1"),
        ("blocks.3.attention.q", "blocks.3.ln_1"),
        ("blocks.3.attention.kv", "blocks.3.ln_1"),
        ("blocks.3.attention.out", "blocks.3.attention.out"),
        ("blocks.3.mlp.fc1", "blocks.3.ln_2"),
        ("blocks.3.mlp.fc2", None),
    ],
)
def test_where_factors_fold(module: str, site: str | None) -> None:
    assert site_of(module) == site


def test_loud_channels_are_evened_out() -> None:
    """Inputs 64 times as large, rows as much smaller: what factors exist for."""
    loud = np.ones(WIDTH, np.float32)
    loud[[3, 17]] = 64
    plain, stressed = rows(0), rows(0) * loud
    weights = {"blocks.0.mlp.fc1": weight(1)}
    inputs = {"blocks.0.mlp.fc1": "u"}
    model = model_of({name: w / loud[:, None] for name, w in weights.items()}, inputs)
    found = choose_smoothing(model, {"u": observed(stressed)})
    assert list(found) == ["blocks.0.ln_2"]
    smoothing = found["blocks.0.ln_2"]
    quiet = choose_smoothing(model_of(weights, inputs), {"u": observed(plain)})
    assert smoothing.error_before > 100 * quiet["blocks.0.ln_2"].error_before
    assert smoothing.error_after < 2 * quiet["blocks.0.ln_2"].error_before
    others = np.delete(smoothing.factors, [3, 17])
    np.testing.assert_allclose(smoothing.factors[[3, 17]] / np.median(others), 64, rtol=0.5)


def test_factors_lie_on_the_grid_that_a_file_stores() -> None:
    stressed = rows(2) * np.geomspace(0.01, 100, WIDTH).astype(np.float32)
    model = model_of({"blocks.0.attention.qkv": weight(3)}, {"blocks.0.attention.qkv": "u"})
    smoothing = choose_smoothing(model, {"u": observed(stressed)})["blocks.0.ln_1"]
    assert smoothing.alpha is not None
    np.testing.assert_array_equal(
        smoothing.factors, np.exp2(smoothing.exponents / STEPS_PER_OCTAVE).astype(np.float32)
    )
    assert abs(smoothing.exponents.mean()) < STEPS_PER_OCTAVE  # Magnitudes stay where they were.


def test_nothing_is_done_where_it_does_not_help() -> None:
    """One row in int8 already: any factor only coarsens some weights."""
    exact = np.random.default_rng(0).integers(-127, 128, (200, WIDTH)).astype(np.float32)
    exact[:, 0] = 127
    exact[:2] = 127  # Both halves have the same maxima.
    whole = np.random.default_rng(1).integers(-127, 128, (WIDTH, 8)).astype(np.float32)
    whole[0] = 127
    model = model_of({"blocks.0.mlp.fc1": whole}, {"blocks.0.mlp.fc1": "u"})
    smoothing = choose_smoothing(model, {"u": observed(exact)})["blocks.0.ln_2"]
    assert smoothing.alpha is None
    assert (smoothing.factors == 1).all()
    assert smoothing.error_after == smoothing.error_before


def test_q_and_kv_share_factors_and_fc2_has_none() -> None:
    names = {
        "blocks.1.attention.kv": "u",
        "blocks.1.attention.q": "taken",
        "blocks.1.mlp.fc2": "gelu",
    }
    model = model_of({name: weight(index) for index, name in enumerate(names)}, names)
    every = rows(0) * np.geomspace(1, 30, WIDTH).astype(np.float32)
    seen = {"u": observed(every), "taken": observed(every[:5]), "gelu": observed(rows(1))}
    found = choose_smoothing(model, seen)
    assert list(found) == ["blocks.1.ln_1"]
    assert found["blocks.1.ln_1"].error_after < found["blocks.1.ln_1"].error_before


def test_silent_channels_and_unread_rows_keep_factor_one() -> None:
    silent = rows(4) * np.geomspace(1, 200, WIDTH).astype(np.float32)
    silent[:, 7] = 0
    unread = weight(5)
    unread[9] = 0
    model = model_of({"blocks.0.mlp.fc1": unread}, {"blocks.0.mlp.fc1": "u"})
    smoothing = choose_smoothing(model, {"u": observed(silent)})["blocks.0.ln_2"]
    assert smoothing.alpha is not None
    assert smoothing.exponents[[7, 9]].tolist() == [0, 0]
    assert np.isfinite(smoothing.factors).all()


def test_alpha_is_judged_on_samples_that_did_not_set_the_factors() -> None:
    """Channels that are quiet in one half and loud in the other: equalising them saturates."""
    unseen = rows(6)
    unseen[::2, :16] *= 0.02
    unseen[1::2, 16:] *= 0.02
    model = model_of({"blocks.0.mlp.fc1": weight(7)}, {"blocks.0.mlp.fc1": "u"})
    seen = observed(unseen)
    assert choose_smoothing(model, {"u": seen})["blocks.0.ln_2"].alpha is None


def test_a_single_sample_is_enough() -> None:
    alone = observed(rows(0) * np.geomspace(1, 30, WIDTH).astype(np.float32))
    alone.half_max[1] = 0
    alone.row_half[:] = 0
    model = model_of({"blocks.0.mlp.fc1": weight(7)}, {"blocks.0.mlp.fc1": "u"})
    smoothing = choose_smoothing(model, {"u": alone})["blocks.0.ln_2"]
    assert smoothing.error_after < smoothing.error_before

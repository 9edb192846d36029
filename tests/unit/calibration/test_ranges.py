"""Histograms of |x| and the ranges estimated from them, against brute force."""

import numpy as np
import pytest

from upperson_calibration.ranges import (
    DEFAULT_ESTIMATOR,
    ESTIMATORS,
    LEVELS,
    AbsHistogram,
    Observed,
    amax_of,
    estimate,
    output_error,
    round_activation,
    round_weight,
)


def observed(values, chunks=3):
    histogram = AbsHistogram()
    for chunk in np.array_split(values, chunks):
        histogram.add(chunk)
    largest = np.full((2, 1), np.abs(values).max())
    return Observed(histogram, largest, values[:1, None], np.zeros(1, np.int64))


def normal(count, seed=0):
    return np.random.default_rng(seed).normal(size=count).astype(np.float32)


def with_outliers(count=200_000):
    values = normal(count)
    values[::20_000] = 60
    return values


def test_bins_are_narrow_and_hold_every_value_whatever_the_range():
    values = np.float32([0.0, -0.0, 1e-30, -1e-3, 0.5, 1.0, -1.0, 3e4, 1e30])
    histogram = AbsHistogram()
    histogram.add(values)
    lower, upper, counts = histogram.bins()
    assert counts.sum() == len(values)
    assert counts.tolist() == [2, 1, 1, 1, 2, 1, 1]
    for value, low, high in zip(np.unique(np.abs(values)), lower, upper, strict=True):
        assert low <= value < high
        assert value == 0 or high - low <= 0.002 * value * 1.001


def test_equal_bins_agree_with_numpy():
    values = normal(300_000)
    amax = float(np.abs(values).max())
    expected, _ = np.histogram(np.abs(values), 200, range=(0, amax))
    found = observed(values).histogram.in_equal_bins(200, amax)
    assert found.sum() == pytest.approx(len(values))
    np.testing.assert_allclose(found, expected, rtol=0.05, atol=60)
    zeros = np.concatenate([np.zeros(50, np.float32), np.float32([1.0])])
    assert observed(zeros).histogram.in_equal_bins(4, 1.0).tolist() == [50, 0, 0, 1]


@pytest.mark.parametrize("percent", ["99.9", "99.999"])
def test_percentiles_agree_with_numpy(percent):
    assert DEFAULT_ESTIMATOR == "percentile-99.999"
    values = np.random.default_rng(1).laplace(size=400_000).astype(np.float32)
    found = amax_of(observed(values), f"percentile-{percent}")
    assert found == pytest.approx(np.percentile(np.abs(values), float(percent)), rel=0.02)
    assert (np.abs(values) <= found).mean() >= float(percent) / 100, "more saturate"


@pytest.mark.parametrize("values", [normal(50_000), with_outliers(50_000)])
def test_mse_finds_the_range_that_brute_force_finds(values):
    def error(amax):
        return float(((round_activation(values, amax) - values).astype(np.float64) ** 2).mean())

    largest = float(np.abs(values).max())
    best = min(map(error, np.linspace(largest / 300, largest, 600)))
    found = amax_of(observed(values), "mse")
    assert error(found) < 1.05 * best
    assert error(found) <= error(largest)


def test_entropy_keeps_a_uniform_range_and_cuts_lonely_outliers():
    uniform = np.random.default_rng(0).uniform(-3, 3, 200_000).astype(np.float32)
    assert amax_of(observed(uniform), "entropy") > 2.9
    assert amax_of(observed(with_outliers()), "entropy") < 10


def test_entropy_chooses_about_what_onnxruntime_chooses():
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    values = np.random.default_rng(0).laplace(size=500_000).astype(np.float32)
    amax = np.abs(values).max()
    counts, edges = np.histogram(values, 1024, range=(-amax, amax))
    collector = calibrate.HistogramCollector("entropy", True, 1024, 256, 99.99, "same")
    _, theirs = collector.get_entropy_threshold(
        (counts, edges.astype(np.float32), -amax, amax), 255
    )
    assert amax_of(observed(values), "entropy") == pytest.approx(float(theirs), rel=0.25)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_estimate_exceeds_the_largest_value_and_zero_stays_zero(estimator):
    tensors = {"a": observed(normal(2_000)), "zero": observed(np.zeros(9, np.float32))}
    found = estimate(tensors, estimator)
    assert 0 < found["a"] <= tensors["a"].amax
    assert found["zero"] == 0
    if estimator == "min-max":
        assert found["a"] == tensors["a"].amax


def test_rounding_is_symmetric_and_saturates_and_weights_have_a_scale_for_each_output():
    rounded = round_activation(np.float32([-9, -1, -0.3, 0, 0.004, 0.3, 1, 9]), 1.0)
    np.testing.assert_allclose(rounded * LEVELS, [-127, -127, -38, 0, 1, 38, 127, 127], atol=1e-5)
    weight = normal(64 * 3).reshape(64, 3) * np.float32([1, 100, 0])
    error = np.abs(round_weight(weight) - weight)
    assert (error <= np.abs(weight).max(axis=0) / LEVELS / 2 * 1.001).all()


def test_output_error_is_relative_and_grows_with_an_outlier():
    rows, weight = normal(64 * 32).reshape(64, 32), normal(32 * 16, 1).reshape(32, 16)
    quiet = output_error(rows, weight, 4.0)
    assert 1e-6 < quiet < 1e-3
    assert output_error(1000 * rows, weight, 4000.0) == pytest.approx(quiet, rel=1e-3)
    assert output_error(rows, weight, 400.0) > 1000 * quiet

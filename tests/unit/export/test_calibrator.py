"""Calibration of a tower: what is measured, and what a reused calibration decides."""

import numpy as np
import pytest

from tests.helpers.refused import refused
from tests.helpers.toy_graphs import toy_graph, toy_inputs
from upperson_calibration.calibration_file import Calibration, Samples
from upperson_calibration.samples import CalibrationSet
from upperson_export import candidates as module
from upperson_export.candidates import CalibrationTask, TowerCalibrator
from upperson_rt.errors import InputError

pytestmark = pytest.mark.usefixtures("toy_graphs")


def samples(seed=0):
    images = toy_inputs("image", 6)
    if seed:
        images = np.random.default_rng(seed).integers(0, 256, images.shape, np.uint8)
    return CalibrationSet(images, toy_inputs("text", 6), "here", "there")


def calibrator(reused=None, seed=0):
    """The toy's image tower; the plain graph also stands for the smoothed one."""
    task = CalibrationTask(
        samples=samples(seed), estimator="min-max", reused=reused, progress=lambda *_: None
    )
    return TowerCalibrator("image", lambda smoothness: toy_graph("image"), task)


def as_file(found):
    return Calibration(
        samples=Samples.of(samples()), estimator="min-max", towers={"image": found.found()}
    )


def test_a_complete_calibration_is_taken_over_whatever_the_samples(monkeypatch):
    first = calibrator()
    assert first.sensitivity()
    assert first.smoothing()
    for smoothness in ("plain", "smoothed"):
        assert first.amax(smoothness)
        assert first.largest_anywhere(smoothness)
    assert first.amax("plain") != calibrator(seed=1).amax("plain")
    calibration = as_file(first)
    found = calibration.towers["image"]
    assert set(found.forms) == {"plain", "smoothed"}
    for name in ("observe", "largest_values", "rank_by_sensitivity", "choose_smoothing"):
        monkeypatch.delattr(module, name)
    again = calibrator(calibration, seed=1)
    assert again.amax("plain") == found.forms["plain"].amax
    assert again.largest_anywhere("smoothed") == found.forms["smoothed"].largest_anywhere
    assert again.smoothing() == found.smoothing
    assert tuple(again.sensitivity()) == found.damage
    assert again.found() == found


def test_a_gap_is_measured_on_the_same_samples_alone():
    first = calibrator()
    first.amax("plain")
    calibration = as_file(first)
    assert set(calibration.towers["image"].forms) == {"plain"}
    other = calibrator(calibration, seed=1)
    for missing, measure in (
        ("ranges of the smoothed image tower", lambda: other.amax("smoothed")),
        ("largest values of the plain image tower", lambda: other.largest_anywhere("plain")),
        ("layer sensitivity of the image tower", other.sensitivity),
        ("ranges of the plain image tower", other.smoothing),
    ):
        with refused("calibration_incomplete", InputError, missing=missing):
            measure()
    same = calibrator(calibration)
    assert same.amax("smoothed")
    assert same.smoothing()
    assert same.found().forms["plain"] == first.found().forms["plain"]

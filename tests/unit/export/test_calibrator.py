"""What is measured of a tower, and what a calibration that is reused decides."""

import numpy as np
import pytest

from tests.helpers.toy_graphs import toy_graph, toy_inputs
from upperson_calibration.calibration_file import Calibration, Samples
from upperson_calibration.samples import CalibrationSet
from upperson_export import forms as module
from upperson_export.forms import CalibrationTask, TowerCalibrator
from upperson_rt.errors import InputError

pytestmark = pytest.mark.usefixtures("toy_graphs")

ESTIMATOR = "min-max"


def samples(seed: int = 0) -> CalibrationSet:
    images = toy_inputs("image", 6)
    if seed:
        images = np.random.default_rng(seed).integers(0, 256, images.shape, np.uint8)
    return CalibrationSet(images, toy_inputs("text", 6), "here", "there")


def calibrator(reused: Calibration | None = None, *, seed: int = 0) -> TowerCalibrator:
    """The toy's image tower; smoothing changes nothing that matters here: its graph is for both."""
    task = CalibrationTask(
        samples=samples(seed),
        estimator=ESTIMATOR,
        reused=reused,
        progress=lambda stage, done, total: None,
    )
    return TowerCalibrator("image", lambda smoothness: toy_graph("image"), task)


def kept(found: TowerCalibrator) -> Calibration:
    """What a file keeps of it."""
    return Calibration(
        samples=Samples.of(samples()), estimator=ESTIMATOR, towers={"image": found.found()}
    )


def complete() -> Calibration:
    first = calibrator()
    assert first.damage()
    assert first.smoothing()
    for smoothness in ("plain", "smoothed"):
        assert first.amax(smoothness)  # type: ignore[arg-type]
        assert first.largest_anywhere(smoothness)  # type: ignore[arg-type]
    return kept(first)


def test_a_complete_calibration_is_taken_over_without_a_look_at_other_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calibration = complete()
    found = calibration.towers["image"]
    assert set(found.forms) == {"plain", "smoothed"}
    for name in ("observe", "largest_values", "rank_by_damage", "choose_smoothing"):
        monkeypatch.delattr(module, name)
    again = calibrator(calibration, seed=1)
    assert again.amax("plain") == found.forms["plain"].amax
    assert again.largest_anywhere("smoothed") == found.forms["smoothed"].largest_anywhere
    assert again.smoothing() == found.smoothing
    assert tuple(again.damage()) == found.damage
    assert again.found() == found


def test_other_samples_give_other_ranges() -> None:
    assert calibrator().amax("plain") != calibrator(seed=1).amax("plain")


def test_what_is_missing_is_never_mixed_from_other_samples() -> None:
    first = calibrator()
    first.amax("plain")
    calibration = kept(first)
    assert set(calibration.towers["image"].forms) == {"plain"}
    other = calibrator(calibration, seed=1)
    for what, ask in (
        ("ranges of the smoothed image tower", lambda: other.amax("smoothed")),
        ("largest values of the plain image tower", lambda: other.largest_anywhere("plain")),
        ("damage of each Linear of the image tower", other.damage),
        ("ranges of the plain image tower", other.smoothing),
    ):
        with pytest.raises(InputError, match=f"has no {what}, and the samples here are not"):
            ask()
    same = calibrator(calibration)
    assert same.amax("smoothed")
    assert same.smoothing()
    assert same.found().forms["plain"] == first.found().forms["plain"]

"""What is measured of a tower, and what a calibration that is reused decides."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.helpers.toy_graphs import toy_graph, toy_inputs
from upperson_calibration.calibration_file import TowerCalibration
from upperson_export import calibrator as module
from upperson_export.calibrator import TowerCalibrator
from upperson_rt.errors import InputError


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """The toy's image tower; smoothing changes nothing that matters here, so it stands for both."""
    onnx.save(toy_graph("image"), tmp_path / "image.onnx")
    return tmp_path / "image.onnx"


def calibrator(
    graph: Path,
    reused: TowerCalibration | None = None,
    *,
    same_samples: bool = False,
    seed: int = 0,
) -> TowerCalibrator:
    inputs = toy_inputs("image", 6)
    if seed:
        inputs = np.random.default_rng(seed).integers(0, 256, inputs.shape, np.uint8)
    return TowerCalibrator(
        "image",
        lambda form: graph,
        inputs,
        estimator="min-max",
        reused=reused,
        same_samples=same_samples,
        progress=lambda work, done, total: None,
    )


def complete(graph: Path) -> TowerCalibration:
    first = calibrator(graph)
    assert first.damage()
    assert first.smoothing()
    for form in ("plain", "smoothed"):
        assert first.amax(form)  # type: ignore[arg-type]
        assert first.largest_anywhere(form)  # type: ignore[arg-type]
    return first.found()


def test_a_complete_calibration_is_taken_over_without_a_look_at_other_samples(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = complete(graph)
    assert set(found.forms) == {"plain", "smoothed"}
    for name in ("observe", "largest_values", "rank_by_damage", "choose_smoothing"):
        monkeypatch.delattr(module, name)
    again = calibrator(graph, found, seed=1)
    assert again.amax("plain") == found.forms["plain"].amax
    assert again.largest_anywhere("smoothed") == found.forms["smoothed"].largest_anywhere
    assert again.smoothing() == found.smoothing
    assert tuple(again.damage()) == found.damage
    assert again.found() == found


def test_other_samples_give_other_ranges(graph: Path) -> None:
    assert calibrator(graph).amax("plain") != calibrator(graph, seed=1).amax("plain")


def test_what_is_missing_is_never_mixed_from_other_samples(graph: Path) -> None:
    first = calibrator(graph)
    first.amax("plain")
    found = first.found()
    assert set(found.forms) == {"plain"}
    other = calibrator(graph, found, seed=1)
    for what, ask in (
        ("ranges of the smoothed image tower", lambda: other.amax("smoothed")),
        ("largest values of the plain image tower", lambda: other.largest_anywhere("plain")),
        ("damage of each Linear of the image tower", other.damage),
        ("ranges of the plain image tower", other.smoothing),
    ):
        with pytest.raises(InputError, match=f"has no {what}, and the samples here are not"):
            ask()
    same = calibrator(graph, found, same_samples=True)
    assert same.amax("smoothed")
    assert same.smoothing()
    assert same.found().forms["plain"] == found.forms["plain"]

"""The calibration file: read back, compared line by line, refused where it does not belong."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.refused import refused
from upperson_calibration.calibration_file import (
    Calibration,
    Ranges,
    SampleHashes,
    Samples,
    TowerCalibration,
    read_calibration,
    write_calibration,
)
from upperson_calibration.samples import CalibrationSet
from upperson_calibration.sensitivity import LayerSensitivity
from upperson_calibration.smoothing import Smoothing
from upperson_rt.errors import InputError, IntegrityError, UsageError

IMAGE_GRAPH, TEXT_GRAPH = "1" * 64, "2" * 64


def ranges(amax, largest=None, **anywhere):
    return Ranges(amax=amax, largest=largest or amax, largest_anywhere=anywhere)


def calibration():
    image = TowerCalibration(
        graph_sha256=IMAGE_GRAPH,
        forms={
            "plain": ranges({"add_2": 3.25, "add_1": 0.0}, {"add_2": 60.5, "add_1": 0.0}),
            "smoothed": ranges({"add_2": 3.0}, {"add_2": 4.0}, add=999.5),
        },
        smoothing={
            "blocks.0.ln_1": Smoothing(0.5, 0.25, 1.5e-5, "-9 0 48"),
            "blocks.0.attention.out": Smoothing(None, 1e-5, 1e-5, "0 0 0"),
        },
        damage=(
            LayerSensitivity("blocks.0.mlp.fc1/MatMul", 1.5, 3.0, 2e-4),
            LayerSensitivity("blocks.0.mlp.fc2/MatMul", 0.5, 0.0, 1e-5),
        ),
    )
    text = TowerCalibration(
        graph_sha256=TEXT_GRAPH, forms={"plain": ranges({"a": 1.0})}, smoothing={}, damage=()
    )
    return Calibration(
        estimator="mse",
        samples=Samples(
            images=SampleHashes(source="folder crops", sha256=("b" * 64, "a" * 64)),
            texts=SampleHashes(source="people, train", sha256=("c" * 64,)),
        ),
        towers={"image": image, "text": text},
    )


def test_reading_gives_what_was_written(tmp_path):
    path = tmp_path / "calibration.json"
    write_calibration(path, calibration())
    found = read_calibration(path)
    content = json.loads(path.read_text("utf-8"))
    for changed in ({"schema_version": 9}, {"estimator": "ms"}, {"extra": 1}):
        (tmp_path / "other.json").write_text(json.dumps(content | changed), "utf-8")
        with pytest.raises(InputError):
            read_calibration(tmp_path / "other.json")
    assert found == calibration()
    assert found.to_json() == path.read_text("utf-8") == calibration().to_json()
    image = json.loads(path.read_text("utf-8"))["towers"]["image"]
    assert list(image) == ["graph_sha256", "forms", "smoothing", "damage"]
    assert list(found.towers["image"].forms["plain"].amax) == ["add_1", "add_2"]
    factors = found.towers["image"].smoothing["blocks.0.ln_1"].factors
    np.testing.assert_array_equal(factors, np.exp2(np.float32([-9 / 8, 0, 6])))


def test_samples_are_recorded_by_hash_in_any_order():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 2, 3), dtype=np.uint8)
    ids = np.array([[5, 9, 0], [5, 6, 9]], np.int32)
    one = Samples.of(CalibrationSet(images, ids, "x", "y"))
    turned = CalibrationSet(images[::-1], ids[::-1], "elsewhere", "y")
    assert one.sha256 == Samples.of(turned).sha256
    assert one.same_as(turned)
    assert not one.same_as(CalibrationSet(images[:2], ids, "x", "y"))
    assert one.describe() == {
        "images": 3, "image_source": "x", "texts": 2, "text_source": "y", "sha256": one.sha256
    }  # fmt: skip


def test_it_is_refused_with_another_estimator_or_for_another_graph():
    one = calibration()
    assert one.require_estimator(None) == one.require_estimator("mse") == "mse"
    with refused("estimator_differs", UsageError, expected="mse", found="entropy"):
        one.require_estimator("entropy")
    assert one.for_graphs({"image": IMAGE_GRAPH, "text": TEXT_GRAPH}) is one
    with refused("calibration_of_other_model", IntegrityError, tower="text"):
        one.for_graphs({"image": IMAGE_GRAPH, "text": "3" * 64})
    with refused("tower_not_calibrated", IntegrityError, tower="text"):
        replace(one, towers={"image": one.towers["image"]}).for_graphs({"text": TEXT_GRAPH})


def places(value, path=()):
    """Yield where every value of a JSON document stands, but for the document itself."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in inside:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))


NEVER_RIGHT = {"removed": None, "NaN": float("nan"), "1e999": float("inf"), "a bool": True}
SELDOM_RIGHT = {"null": None, "blank": " ", "-1": -1, "a list": [None], "an object": {"x": None}}

FREE_NAMES = ("amax", "largest", "largest_anywhere", "smoothing", "towers", "forms")
"""Objects that may lack a key."""


@pytest.mark.parametrize("how", [*NEVER_RIGHT, *SELDOM_RIGHT])
def test_whatever_is_wrong_with_one_field_is_an_input_error(tmp_path, how):
    """Or the file still reads, and then it can be written again."""
    text = calibration().to_json()
    path = tmp_path / "calibration.json"
    for place in places(json.loads(text)):
        content = json.loads(text)
        parent, key = content, place[-1]
        for step in place[:-1]:
            parent = parent[step]
        if how == "removed":
            del parent[key]
        else:
            parent[key] = (NEVER_RIGHT | SELDOM_RIGHT)[how]
        path.write_text(json.dumps(content).replace("Infinity", "1e999"), "utf-8")
        may_lack = isinstance(key, int) or (len(place) > 1 and place[-2] in FREE_NAMES)
        if how in NEVER_RIGHT and not (how == "removed" and may_lack):
            with pytest.raises(InputError, match=r"calibration\.json"):
                read_calibration(path)
            continue
        try:
            found = read_calibration(path)
        except InputError:
            continue
        write_calibration(path, found)
        assert read_calibration(path).to_json() == found.to_json()


def test_values_that_are_not_finite_are_not_written(tmp_path):
    found = calibration()
    broken = replace(
        found.towers["image"], damage=(LayerSensitivity("fc1", float("nan"), 3.0, 2e-4),)
    )
    found = replace(found, towers={**found.towers, "image": broken})
    with refused("calibration_not_finite", InputError):
        write_calibration(tmp_path / "calibration.json", found)
    assert list(tmp_path.iterdir()) == []

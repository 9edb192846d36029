"""The calibration file: read back, compared line by line, refused where it does not belong."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
from upperson_calibration.sensitivity import LayerDamage
from upperson_calibration.smoothing import Smoothing
from upperson_rt.errors import InputError, IntegrityError, UsageError

IMAGE_GRAPH, TEXT_GRAPH = "1" * 64, "2" * 64


def calibration() -> Calibration:
    smoothing = Smoothing(0.5, 0.25, 1.5e-5, "-9 0 48")
    none = Smoothing(None, 1e-5, 1e-5, "0 0 0")
    image = TowerCalibration(
        graph_sha256=IMAGE_GRAPH,
        forms={
            "plain": Ranges(
                amax={"add_2": 3.25, "add_1": 0.0},
                largest={"add_2": 60.5, "add_1": 0.0},
                largest_anywhere={},
            ),
            "smoothed": Ranges(
                amax={"add_2": 3.0}, largest={"add_2": 4.0}, largest_anywhere={"add": 999.5}
            ),
        },
        smoothing={"blocks.0.ln_1": smoothing, "blocks.0.attention.out": none},
        damage=(
            LayerDamage("blocks.0.mlp.fc1/MatMul", 1.5, 3.0, 2e-4),
            LayerDamage("blocks.0.mlp.fc2/MatMul", 0.5, 0.0, 1e-5),
        ),
    )
    text = TowerCalibration(
        graph_sha256=TEXT_GRAPH,
        forms={"plain": Ranges(amax={"a": 1.0}, largest={"a": 1.0}, largest_anywhere={})},
        smoothing={},
        damage=(),
    )
    return Calibration(
        estimator="mse",
        samples=Samples(
            images=SampleHashes(source="folder crops", sha256=("b" * 64, "a" * 64)),
            texts=SampleHashes(source="people, train", sha256=("c" * 64,)),
        ),
        towers={"image": image, "text": text},
    )


def test_reading_gives_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(path, calibration())
    found = read_calibration(path)
    assert found.to_json() == path.read_text("utf-8") == calibration().to_json()
    assert found.samples == calibration().samples
    image = found.towers["image"]
    assert found.estimator == "mse"
    assert image.forms == calibration().towers["image"].forms
    assert list(image.forms["plain"].amax) == ["add_1", "add_2"]
    assert image.damage == calibration().towers["image"].damage
    smoothing = image.smoothing["blocks.0.ln_1"]
    assert smoothing.alpha == 0.5
    np.testing.assert_array_equal(
        smoothing.factors, calibration().towers["image"].smoothing["blocks.0.ln_1"].factors
    )
    assert smoothing.factors[2] == 64
    assert image.smoothing["blocks.0.attention.out"].alpha is None
    assert found.towers["text"].damage == ()


def test_a_changed_range_is_one_line_of_a_difference() -> None:
    one = calibration()

    def with_range(value: float) -> str:
        image = one.towers["image"]
        plain = replace(image.forms["plain"], amax={"add_1": 0.0, "add_2": value})
        changed = replace(image, forms={**image.forms, "plain": plain})
        return replace(one, towers={**one.towers, "image": changed}).to_json()

    assert with_range(3.2500004) == one.to_json()
    lines = one.to_json().splitlines(), with_range(3.26).splitlines()
    assert [a.strip() for a, b in zip(*lines, strict=True) if a != b] == ['"add_2": 3.25']


def test_samples_are_recorded_by_hash_in_any_order() -> None:
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


def test_another_estimator_than_the_files_is_a_usage_error() -> None:
    assert calibration().require_estimator(None) == calibration().require_estimator("mse") == "mse"
    with pytest.raises(UsageError, match=r"--estimator entropy does not go .* ranges are mse"):
        calibration().require_estimator("entropy")


def test_it_is_refused_for_another_graph() -> None:
    one = calibration()
    assert one.for_graphs({"image": IMAGE_GRAPH, "text": TEXT_GRAPH}) is one
    with pytest.raises(IntegrityError, match=r"another text tower: .* 222222.*found 333333"):
        one.for_graphs({"image": IMAGE_GRAPH, "text": "3" * 64})
    with pytest.raises(IntegrityError, match="no text tower, only image"):
        replace(one, towers={"image": one.towers["image"]}).for_graphs({"text": TEXT_GRAPH})


Change = Callable[[dict[str, Any]], object]


def plain(content: dict[str, Any]) -> dict[str, Any]:
    ranges: dict[str, Any] = content["towers"]["text"]["forms"]["plain"]
    return ranges


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.update(schema_version=9),
            "has version 9, this program reads up to 2: calibrate again",
        ),
        (lambda c: c.update(extra=1), "unknown key 'extra'"),
        (lambda c: c.pop("samples"), "samples: missing"),
        (lambda c: c["samples"]["images"].update(sha256="a"), r"images\.sha256: expected a list"),
        (
            lambda c: c["samples"]["texts"].update(sha256=["a"]),
            r"texts\.sha256\[0\]: expected 64 lower-case hex digits, found 'a'",
        ),
        (
            lambda c: c["towers"].update(audio=c["towers"]["text"]),
            "towers: unknown key 'audio'",
        ),
        (
            lambda c: c.update(estimator="ms"),
            "expected one of min-max, .*, mse, found 'ms'",
        ),
        (lambda c: plain(c)["amax"].update(a=-1), r"amax\.a: expected a range of at least 0"),
        (lambda c: plain(c)["amax"].update(a="1"), "at least 0, found .1.$"),
        (lambda c: plain(c)["amax"].update(b=1.0), "'b' .* not the same tensors"),
        (
            lambda c: c["towers"]["text"]["forms"].update(mixed=plain(c)),
            "unknown key 'mixed'",
        ),
        (lambda c: c["towers"]["text"].pop("damage"), "damage: missing"),
        (lambda c: c["towers"]["image"]["damage"][0].pop("node"), "node: missing"),
        (
            lambda c: c["towers"]["image"]["smoothing"]["blocks.0.ln_1"].update(
                log2_factors_in_eighths="1 2.5"
            ),
            "expected whole numbers",
        ),
        (
            lambda c: c["towers"]["image"]["smoothing"]["blocks.0.ln_1"].update(
                log2_factors_in_eighths="1 2000"
            ),
            "from -100 to 100",
        ),
        (
            lambda c: c["towers"]["image"]["smoothing"]["blocks.0.ln_1"].update(
                log2_factors_in_eighths=" "
            ),
            "expected numbers, found none",
        ),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(
    tmp_path: Path, change: Change, message: str
) -> None:
    content = json.loads(calibration().to_json())
    change(content)
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(InputError, match=message):
        read_calibration(path)


@pytest.mark.parametrize("text", ["", "[", "[]", '{"schema_version": NaN}', "\xff"])
def test_what_is_no_calibration_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text, "latin-1")
    with pytest.raises(InputError, match=r"calibration\.json"):
        read_calibration(path)


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none\.json"):
        read_calibration(tmp_path / "none.json")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
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
def test_whatever_is_wrong_with_one_field_is_an_input_error(tmp_path: Path, how: str) -> None:
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


def test_what_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    found = calibration()
    broken = replace(found.towers["image"], damage=(LayerDamage("fc1", float("nan"), 3.0, 2e-4),))
    found = replace(found, towers={**found.towers, "image": broken})
    with pytest.raises(InputError, match="not finite: the weights are so large"):
        write_calibration(tmp_path / "calibration.json", found)
    assert list(tmp_path.iterdir()) == []

"""Detectors as users name them: tried by doctor, used by index and watch, refused in one line."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.helpers.command_line import ROOT
from tests.helpers.detector_heads import COLOUR, write_detector
from tests.helpers.invoke import refusal
from tests.helpers.invoke import run_rt as run
from tests.helpers.toy_bundle import make_toy_bundle
from upperson_rt.gallery import Gallery
from upperson_synthetic.video import VideoSpec, write_video


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detectors")
    make_toy_bundle(folder / "bundle")
    write_video(folder / "street.avi", VideoSpec(people=3, seconds=2, fps=2, seed=5))
    write_detector(folder / "yolox.onnx", "yolox")
    write_detector(folder / "odd.onnx", "yolox-decoded")
    scene(folder / "scenes" / "two.png", (20, 24), (60, 8))
    scene(folder / "scenes" / "nobody.png")
    return folder


@pytest.fixture
def work(original, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(original, tmp_path / "work"))
    for name in ("UPPERSON_BUNDLE", "UPPERSON_GALLERY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "work"


def scene(path, *places):
    """Draw a picture of 384 x 256 with people where a cell of the 96 x 64 input is red."""
    image = np.full((256, 384, 3), 114, np.uint8)
    for x, y in places:
        x, y = x // 8 * 32, y // 8 * 32
        image[y : y + 32, x : x + 32] = COLOUR
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def rows_of(result):
    return {check["name"]: check for check in json.loads(result.stdout)["checks"]}


def test_doctor_shows_what_a_detector_is_and_finds(work):
    asked = ("doctor", "--detector", "yolox.onnx", "--image", "scenes/two.png")
    result = run(*asked, "--sheet", "boxes.png", "--json")
    assert result.exit_code == 0, result.stderr
    rows = rows_of(result)
    assert rows["detector"]["status"] == "ok"
    assert rows["detector"]["facts"]["layout"] == "yolox"
    assert "input 96 x 64" in rows["detector"]["detail"]
    assert rows["people"]["status"] == "ok"
    # 24 x 40 around the cells, four times as large in the picture and cut at its border.
    assert sorted(rows["people"]["facts"]["boxes"]) == [[32, 32, 128, 192], [192, 0, 288, 128]]
    with Image.open("boxes.png") as image:
        drawn = np.asarray(image)
    assert drawn.shape == (256, 384, 3)
    assert (drawn[191, 40:120] == (226, 48, 48)).all()


def test_doctor_looks_at_drawn_figures(work):
    found = rows_of(run("doctor", "--detector", "hog", "--sheet", "boxes.png", "--json"))["people"]
    assert (found["status"], found["facts"]["figures"]) == ("ok", 3)
    assert found["detail"].startswith("3 of 3 drawn figures found, 3 boxes: (")
    with Image.open("boxes.png") as drawn:
        assert drawn.size == (960, 540)
    result = run("doctor", "--detector", "yolox.onnx", "--json")
    nobody = rows_of(result)["people"]
    assert (nobody["status"], nobody["facts"]["figures"], result.exit_code) == ("fail", 0, 3)
    assert "try  --image FILE" in nobody["fix"]


def test_doctor_warns_of_boxes_beside_the_figures_and_of_a_detector_that_fails(work, monkeypatch):
    lines = [
        *("def beside():", "    return lambda frame: [(300, 0, 380, 60)]"),
        *("def fails():", "    def detect(frame):", "        raise ValueError('no')"),
        "    return detect",
    ]
    (work / "own_boxes.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(work)
    beside = run("doctor", "--detector", "own_boxes:beside", "--json")
    assert beside.exit_code == 0
    assert rows_of(beside)["people"]["status"] == "warn"
    assert "--detector-layout" not in rows_of(beside)["people"]["fix"], "only ONNX files have one"
    fails = run("doctor", "--detector", "own_boxes:fails", "--json")
    assert fails.exit_code == 3
    assert "ValueError: no" in rows_of(fails)["people"]["detail"]
    odd = run("doctor", "--detector", "odd.onnx", "--json")
    assert odd.exit_code == 3
    assert "yolov5 or yolox-decoded" in rows_of(odd)["detector"]["detail"]


def people_in():
    with Gallery.open("gallery") as gallery:
        return {item.key: item for item in gallery.items()}


def test_index_finds_the_people_in_whole_pictures(work):
    result = run("index", "scenes", "--detector", "yolox.onnx", "--detector-score", 0.5)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "indexed 2 people in 2 pictures; gallery 'gallery' now holds 2\n"
    assert "in 1 of 2 pictures" in result.stderr
    assert "wider than high" not in result.stderr
    path = str(work / "scenes" / "two.png")
    found = people_in()
    assert set(found) == {f"{path}#person=1", f"{path}#person=2"}
    assert {item.source for item in found.values()} == {path}
    assert {item.box for item in found.values()} == {(32, 32, 128, 192), (192, 0, 288, 128)}
    assert all(item.attributes["score"] > 0.99 for item in found.values())
    lines = run("query", "man in red").stdout.splitlines()
    assert all(any(str(item.box) in line for line in lines) for item in found.values())
    assert "(" not in run("query", "man in red", "-k", 1).stdout, "boxes tell people apart only"

    # One of them left: the picture gives up what it no longer has, and only that.
    scene(work / "scenes" / "two.png", (20, 24))
    assert run("index", "scenes", "--detector", "yolox.onnx").exit_code == 0
    assert set(people_in()) == {f"{path}#person=1"}
    # Taken for a person as a whole, and back again.
    assert run("index", "scenes").exit_code == 0
    assert set(people_in()) == {path, str(work / "scenes" / "nobody.png")}
    assert run("index", "scenes", "--detector", "yolox.onnx").exit_code == 0
    assert set(people_in()) == {f"{path}#person=1"}


def test_people_who_are_too_small_are_grey_in_the_sheet_and_not_indexed(work, monkeypatch):
    large, small = (100, 10, 160, 180), (10, 10, 50, 60)
    (work / "own_small.py").write_text(f"def make():\n    return lambda frame: [{large}, {small}]")
    monkeypatch.syspath_prepend(work)
    asked = ("--detector", "own_small:make")
    shown = run("doctor", *asked, "--image", "scenes/two.png", "--sheet", "boxes.png", "--json")
    assert rows_of(shown)["people"]["facts"]["too_small"] == [False, True]
    with Image.open("boxes.png") as image:
        assert [image.getpixel((right - 1, 55)) for _, _, right, _ in (large, small)] == [
            (226, 48, 48),
            (130, 130, 130),
        ]
    result = run("index", "scenes/two.png", *asked)
    assert "1 person left out: lower than 64 or narrower than 24 pixels" in result.stderr
    assert {item.box for item in people_in().values()} == {large}


def test_index_warns_of_pictures_that_are_wider_than_high(work):
    Image.new("RGB", (20, 60)).save(work / "scenes" / "person.png")
    result = run("index", "scenes")
    assert result.exit_code == 0
    assert "warning: 2 of 3 pictures are wider than high and squeezed into 8 x 24" in result.stderr
    assert "--detector" in result.stderr
    done = json.loads(run("index", "scenes", "--json").stdout)
    assert (done["wide"], done["empty"], done["too_small"]) == (2, 0, 0)


def test_index_goes_past_a_detector_that_fails(work, monkeypatch):
    lines = [
        "def make():",
        "    def detect(frame):",
        "        return 1 / int(frame[0, 0, 0] - 114)",
    ]
    (work / "own_index.py").write_text("\n".join([*lines, "    return detect"]))
    monkeypatch.syspath_prepend(work)
    result = run("index", "scenes", "--detector", "own_index:make")
    assert result.exit_code == 3
    assert "the detector fails on " in result.stderr
    assert "none of 2 pictures could be used" in result.stderr
    (work / "own_rows.py").write_text("def make():\n    return lambda frame: [[1, 2, 3]]")
    result = run("index", "scenes", "--detector", "own_rows:make")
    assert result.exit_code == 3
    assert str(work / "scenes" / "two.png") in result.stderr


def test_a_detector_that_exits_never_makes_a_command_succeed(work, monkeypatch):
    lines = ["import sys", "def make():", "    raise KeyboardInterrupt"]
    lines += ["def lazy():", "    return lambda frame: sys.exit(0)"]
    (work / "own_exits.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(work)
    for command, detector, exit_code, error in (
        (("watch", "street.avi"), "make", 3, "KeyboardInterrupt"),
        (("index", "scenes/two.png"), "lazy", 5, "SystemExit: 0"),
        (("doctor",), "lazy", 3, "SystemExit: 0"),
    ):
        result = run(*command, "--detector", f"own_exits:{detector}")
        assert result.exit_code == exit_code
        assert error in result.stdout + result.stderr


def test_the_detector_of_the_page_runs(work, monkeypatch):
    page = (ROOT / "docs/how-to/detectors.md").read_text("utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    (work / "people.py").write_text(block)
    monkeypatch.syspath_prepend(work)
    done = run("watch", "street.avi", "--detector", "people:make", "--threads", 1, "--json")
    assert done.exit_code == 0, done.stderr
    camera = json.loads(done.stdout)["cameras"]["street"]
    assert camera["frames_processed"] == 4
    assert camera["detections"] > 0


YOLOX = ("--detector", "yolox.onnx")


def test_errors_are_one_line_and_a_code(work):
    for arguments, exit_code, code in (
        (("watch", "street.avi", "--detector", "odd.onnx"), 3, "ambiguous_layout"),
        (("watch", "street.avi", *YOLOX, "--detector-layout", "yolo"), 2, "unknown_layout"),
        (("watch", "street.avi", *YOLOX, "--detector-score", "40"), 2, "setting_out_of_range"),
        (("watch", "street.avi", "--detector-layout", "yolox"), 2, "detector_option_refused"),
        (("index", "scenes", *YOLOX, "--detector-class", "dog"), 3, "detector_class_unknown"),
        (("index", "scenes", "--detector-score", "0.5"), 2, None),
        (("index", "scenes", "--detector", "street.json"), 2, None),
        (("doctor", "--image", "scenes/two.png"), 2, None),
        (("doctor", "--detector", "hog", "--sheet", "boxes.jpg"), 2, None),
        (("doctor", "--detector", "hog", "--sheet", "none/boxes.png"), 3, None),
    ):
        refusal(run(*arguments, "--json"), exit_code, code)
    assert not (work / "none").exists()

"""The extensions of docs/examples, used by commands."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.extensions import examples, installed
from tests.helpers.invoke import run_rt as run
from tests.helpers.invoke import run_rt_json

CLOSING = """
from pathlib import Path

class Output:
    def committed(self, items, replaced):
        if Path("fail").exists():
            raise OSError("no space")

    def close(self):
        Path("closed").touch()
"""


@pytest.fixture
def work(enter, bundle_and_crops, tmp_path):
    work = enter(bundle_and_crops)
    with examples(tmp_path):
        yield work


def printed(result):
    return [json.loads(line) for line in result.stderr.splitlines() if line.startswith("{")]


def test_outputs_get_each_committed_row_and_are_closed(work, tmp_path):
    rows = printed(run("index", "crops", "--output", "print", "--camera", "gate"))
    crops = sorted(file.name for file in (work / "crops").iterdir())
    assert [Path(row["source"]).name for row in rows] == crops
    assert {(row["camera"], row["replaced"]) for row in rows} == {("gate", False)}
    again = run("index", "crops/red.png", "--output", "print", "--output", "print")
    assert [row["replaced"] for row in printed(again)] == [True, True]

    (tmp_path / "closing_output.py").write_text(CLOSING)
    points = {"upperson.outputs": {"closing": "closing_output:Output"}}
    with installed(tmp_path, points, tmp_path):
        for fails in (False, True):
            if fails:
                (work / "fail").touch()
            result = run("index", "crops", "--output", "closing")
            assert (result.exit_code == 0) != fails
            (work / "closed").unlink()
        assert run_rt_json("gallery", "info")["items"] == 6, "the rows stay"
        assert run("index", "crops", "--output", "closing", "--output", "none").exit_code == 2
        assert (work / "closed").exists()


def test_a_store_and_a_detector_of_extensions(work):
    scene = np.full((300, 200, 3), 20, np.uint8)
    scene[50:250, 60:140] = (220, 30, 30)
    Image.fromarray(scene).save("scene.png")
    place = ("-g", "memory://of-this-test")
    indexed = run_rt_json("index", "scene.png", "--detector", "contrast", *place)
    assert (indexed["indexed"], indexed["items"]) == (1, 1)
    (hit,) = run_rt_json("query", "red", *place)["hits"]
    assert hit["box"] == [60, 50, 140, 250]
    assert run_rt_json("gallery", "verify", *place)["ok"]
    assert run("gallery", "info", "-g", "memory://other").exit_code == 3

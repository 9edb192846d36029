"""``upperson import`` as users run it, and the commands that follow."""

import json
import math
from dataclasses import replace

import pytest
import torch

from tests.helpers.invoke import run, run_failing
from tests.helpers.official_checkpoint import (
    PLAIN,
    TOY_OFFICIAL,
    irra_heads,
    know_toy_base,
    official_state,
    save_official,
)
from tests.helpers.toy_clip import IMAGE_SIZE
from tests.helpers.toy_graphs import export_exchanged
from upperson_synthetic import SyntheticSpec, write_dataset

SIZE = ["--base", "toy", "--height", IMAGE_SIZE[0], "--width", IMAGE_SIZE[1]]
PEOPLE = SyntheticSpec(look="street", train_ids=6, val_ids=4, test_ids=5, views=2)


@pytest.fixture(autouse=True)
def _toy_base(monkeypatch):
    know_toy_base(monkeypatch)


@pytest.mark.usefixtures("toy_graphs")
def test_an_imported_run_evaluates_and_exports(work, monkeypatch):
    monkeypatch.setattr("upperson_export.candidates.export_onnx", export_exchanged)
    save_official(work / "best.pth")
    people = write_dataset(work / "people", PEOPLE)
    result = run("import", "best.pth", "--output", "run", *SIZE)
    assert result.exit_code == 0, result.stderr
    assert "3 rows, all blocks" in result.stdout
    assert "rank 4, all blocks" in result.stdout
    assert "width / 4, all blocks" in result.stdout
    assert "20 tensors (20 alias)" in result.stdout
    assert "upperson export run --root DIR" in result.stdout

    result = run("evaluate", "run", "--root", people, "--json")
    assert result.exit_code == 0, result.stderr
    result = run("export", "run", "--output", "bundle", "--no-int8")
    assert result.exit_code == 3
    assert "--root" in result.stderr
    result = run("export", "run", "--root", people, "--output", "bundle", "--no-int8", "--json")
    assert result.exit_code == 0, result.stderr
    assert all(
        math.isfinite(value)
        for value in json.loads(result.stdout)["variants"]["fp32"]["metrics"].values()
    )


def test_a_fully_tuned_model_is_imported_with_its_report(work):
    state = official_state(replace(TOY_OFFICIAL, **PLAIN))
    torch.save({"model": state | irra_heads() | {"odd.w": torch.zeros(1)}}, work / "best.pth")
    result = run("import", "best.pth", "--output", "run", *SIZE, "--json")
    assert result.exit_code == 0, result.stderr
    assert "1 unknown tensors are left out, first odd.w" in result.stderr
    report = json.loads(result.stdout)
    assert report["run"] == "run"
    assert report["kind"] == "fine-tuned CLIP"
    assert report["mapped"] == len(state)
    assert report["ignored"] == {"training head": len(irra_heads()), "unknown": 1}
    people = write_dataset(work / "people", PEOPLE)
    assert run("evaluate", "run", "--root", people).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (["nowhere.pth", "--output", "run"], 3, "checkpoint_not_found"),
        (["best.pth", "--output", "run", "--dataset", "chuk-pedes"], 2, "dataset_unknown"),
        (["best.pth", "--output", "run", "--base", "toyy"], 2, "base_unknown"),
        (["best.pth", "--output", "run", "--base", "toy"], 3, "image_size_wrong"),
        (["best.pth", "--output", "run"], 3, "base_does_not_fit"),
        (["junk.pth", "--output", "run"], 3, "checkpoint_unreadable"),
        (["best.pth", "--output", ".", *SIZE], 3, None),
    ],
)
def test_errors_are_one_line_and_leave_nothing(work, arguments, status, code):
    save_official(work / "best.pth")
    (work / "junk.pth").write_bytes(b"junk")
    run_failing(status, code, "import", *arguments)
    assert {path.name for path in work.iterdir()} == {"best.pth", "junk.pth"}

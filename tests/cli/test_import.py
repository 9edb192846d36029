"""``upperson import`` as users run it, and the commands that follow."""

import json
import math
from dataclasses import replace

import pytest
import torch

from tests.helpers.invoke import run, run_failing, run_json
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


@pytest.fixture(autouse=True)
def _toy_base(monkeypatch):
    know_toy_base(monkeypatch)


@pytest.mark.usefixtures("toy_graphs")
def test_imported_runs_evaluate_and_export(work, monkeypatch):
    monkeypatch.setattr("upperson_export.candidates.export_onnx", export_exchanged)
    spec = SyntheticSpec(look="street", train_ids=6, val_ids=4, test_ids=5, views=2)
    people = write_dataset(work / "people", spec)
    save_official(work / "best.pth")
    assert run("import", "best.pth", "--output", "run", *SIZE).exit_code == 0
    assert run("evaluate", "run", "--root", people).exit_code == 0
    fp32 = ("export", "run", "--output", "bundle", "--no-int8")
    run_failing(3, None, *fp32)  # The run names no data set.
    metrics = run_json(*fp32, "--root", people)["variants"]["fp32"]["metrics"]
    assert all(map(math.isfinite, metrics.values()))

    state = official_state(replace(TOY_OFFICIAL, **PLAIN))  # Fully tuned, with other heads.
    torch.save({"model": state | irra_heads() | {"odd.w": torch.zeros(1)}}, work / "best.pth")
    result = run("import", "best.pth", "--output", "tuned", *SIZE, "--json")
    assert "odd.w" in result.stderr
    report = json.loads(result.stdout)
    assert (report["run"], report["kind"]) == ("tuned", "fine-tuned CLIP")
    assert report["mapped"] == len(state)
    assert report["ignored"] == {"training head": len(irra_heads()), "unknown": 1}
    assert run("evaluate", "tuned", "--root", people).exit_code == 0


def test_errors_are_one_line_and_leave_nothing(work):
    save_official(work / "best.pth")
    (work / "junk.pth").write_bytes(b"junk")
    for status, code, *arguments in (
        (3, "checkpoint_not_found", "nowhere.pth", "--output", "run"),
        (2, "dataset_unknown", "best.pth", "--output", "run", "--dataset", "chuk-pedes"),
        (2, "base_unknown", "best.pth", "--output", "run", "--base", "toyy"),
        (3, "image_size_wrong", "best.pth", "--output", "run", "--base", "toy"),
        (3, "base_does_not_fit", "best.pth", "--output", "run"),
        (3, "checkpoint_unreadable", "junk.pth", "--output", "run"),
        (3, None, "best.pth", "--output", ".", *SIZE),
    ):
        run_failing(status, code, "import", *arguments)
        assert {path.name for path in work.iterdir()} == {"best.pth", "junk.pth"}

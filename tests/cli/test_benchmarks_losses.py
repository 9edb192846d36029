"""``python -m benchmarks.losses``; its runs are those of training and are not made here."""

import json
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from benchmarks import losses
from benchmarks.runs import Size, people_in
from upperson.config import TrainConfig
from upperson.model.base import ASSETS

TINY = ("--people", "6", "--test-people", "3", "--views", "1", "--epochs", "1", "--seeds", "2")


def captions(root: Path) -> dict[tuple[str, int], list[str]]:
    found: dict[tuple[str, int], list[str]] = {}
    for line in (root / "annotations.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        found.setdefault((record["split"], record["pid"]), []).append(record["caption"])
    return found


def test_every_wrong_caption_is_of_somebody_else(tmp_path: Path) -> None:
    size = Size(people=20, test_people=5, views=2, epochs=1)
    people = people_in(tmp_path, size)
    right, wrong = captions(people), captions(losses.wrong_captions(people, 50, seed=1))
    assert Counter(chain(*right.values())) == Counter(chain(*wrong.values()))
    kept = 0
    for (split, pid), texts in wrong.items():
        if split == "test":
            assert texts == right[split, pid]
        else:
            kept += sum(text in right[split, pid] for text in texts)
    assert kept == 40, "half of 20 people x 2 views x 2 captions"
    assert captions(losses.wrong_captions(people, 50, seed=2)) != wrong
    assert losses.wrong_captions(people, 0, seed=1) == people


def test_a_difference_has_students_interval_over_the_seeds() -> None:
    found = losses.difference([30.0, 32.0, 31.0], [31.0, 34.0, 34.0])
    assert found["mean"] == 33
    assert found["difference"] == 2
    assert found["half_interval"] == pytest.approx(4.303 * 1 / 3**0.5)


def test_every_kind_is_trained_once_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[TrainConfig] = []

    def fake(config: TrainConfig, run: Path, *_: object, **__: object) -> None:
        trained.append(config)
        run.mkdir(parents=True)
        r1 = 30.0 + config.seed + (5 if config.loss == "tal" and config.pretrained else 0)
        (run / "results.json").write_text(json.dumps({"test": {"R@1": r1}}))

    monkeypatch.setattr("benchmarks.runs.train", fake)
    command = [*TINY, "--output", str(tmp_path / "kept"), "--json"]
    result = CliRunner().invoke(losses.app, command)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(trained) == 2 * (3 * 5 + 3)
    assert {config.loss for config in trained} == {"sdm", "asdm", "tal"}
    noisy = [config for config in trained if config.root.endswith("-50-2")]
    assert [(config.loss, config.leave_out_noisy) for config in noisy] == [
        ("sdm", False), ("asdm", False), ("tal", False), ("sdm", True), ("tal", True)
    ]  # fmt: skip
    assert found["test_r1"]["20 %"]["asdm"] == [31, 32]
    assert found["against_sdm"]["spread base"]["tal"]["difference"] == 5
    losses._show(found)
    assert "36.50 (+5.00 ±0.00)" in capsys.readouterr().out
    again = CliRunner().invoke(losses.app, command)
    assert json.loads(again.stdout)["test_r1"] == found["test_r1"]
    assert len(trained) == 36, "finished runs are read"

    spread = load_file(next(config.pretrained for config in trained if config.pretrained))
    shipped = load_file(ASSETS / "upperson-small.safetensors")
    changed = {
        name for name, tensor in shipped.items() if not torch.equal(tensor.float(), spread[name])
    }
    assert changed == {"visual.ln_post.bias", "ln_final.bias"}

"""``upperson train`` as a user and a power cut meet it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.command_line import SOURCES
from tests.helpers.data_sets import write_cuhk_pedes
from tests.helpers.invoke import run
from upperson_synthetic import SyntheticSpec, write_dataset

RUN = ["--epochs", "2", "--batch-size", "8", "--set", "checkpoint_every=1"]
"""8 people x 2 views x 2 captions in batches of 8: two epochs of 4 steps."""


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = SyntheticSpec(look="street", train_ids=8, val_ids=4, test_ids=4, views=2)
    return write_dataset(tmp_path_factory.mktemp("few") / "people", spec)


def start(*arguments: object, cwd: Path) -> subprocess.Popen[bytes]:
    with (cwd / "stderr.txt").open("wb") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "upperson", *map(str, arguments)],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, SOURCES))},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )


def kill_at(process: subprocess.Popen[bytes], checkpoint: Path) -> None:
    """Kill a process without mercy once a checkpoint of this step, or of a later one, is there."""
    deadline = time.monotonic() + 60
    while not [path for path in checkpoint.parent.glob("step_*") if path >= checkpoint]:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL


@pytest.mark.timeout(180, func_only=True)
def test_a_killed_run_ends_as_one_that_was_not(people: Path, tmp_path: Path) -> None:
    whole = run("train", "--root", people, "--output", tmp_path / "whole", *RUN)
    assert whole.exit_code == 0, whole.stderr
    killed = start("train", "--root", people, "--output", "killed", *RUN, cwd=tmp_path)
    last = tmp_path / "killed" / "last"
    kill_at(killed, last / "step_00000003.safetensors")
    kill_at(start("train", "--resume", "killed", cwd=tmp_path), last / "step_00000006.safetensors")
    resumed = start("train", "--resume", "killed", cwd=tmp_path)
    assert resumed.wait(60) == 0
    assert "note: resuming at epoch" in (tmp_path / "stderr.txt").read_text("utf-8")
    for name in ("metrics.csv", "adapter.safetensors", "config.yaml"):
        ours, theirs = (tmp_path / folder / name for folder in ("killed", "whole"))
        assert ours.read_bytes() == theirs.read_bytes(), name
    results = [
        json.loads((tmp_path / folder / "results.json").read_text("utf-8")) | {"seconds": 0}
        for folder in ("killed", "whole")
    ]
    assert results[0] == results[1]


def test_a_dry_run_prints_the_plan_and_writes_nothing(people: Path, work: Path) -> None:
    result = run("train", "--root", people, "--dry-run", "--batch-size", 6, "--loss", "sdm+id")
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["train", "16", "32", "8"] in rows
    assert "6: 1 epoch of 6 steps of 6 pairs" in result.stdout
    assert "warning" not in result.stderr
    activations = {}
    for size in (32, 5000):
        result = run("train", "--root", people, "--dry-run", "--batch-size", size, "--json")
        told = "a batch of 5000 is more than the 32 pairs of the training split" in result.stderr
        assert told == (size == 5000)
        activations[size] = json.loads(result.stdout)["memory"]["activation_bytes"]
    assert activations[5000] == activations[32], "no batch is larger than the split"
    plan = json.loads(
        run("train", "--root", people, "--dry-run", "--json", "--loss", "sdm+id").stdout
    )
    parts = {part["part"]: part["total"] for part in plan["parts"]}
    assert parts["classifier"] == (128 + 1) * 8
    assert sum(parts.values()) == plan["trained"]
    assert list(work.iterdir()) == []


def test_a_dry_run_tells_of_captions_that_stay_as_they_are(people: Path, work: Path) -> None:
    copy = shutil.copytree(people, work / "copy")
    lines = (copy / "annotations.jsonl").read_text("utf-8").splitlines()
    rest = [json.dumps(json.loads(line) | {"caption": "somebody"}) for line in lines[1:]]
    (copy / "annotations.jsonl").write_text("\n".join([lines[0], *rest]), "utf-8")
    options = ("--dry-run", "--set", "shorten_captions=0.5")
    result = run("train", "--root", copy, *options)
    assert result.exit_code == 0, result.stderr
    line = "note: shorten_captions leaves most captions as they are: only 1 of 32 are captions in"
    assert line in result.stderr
    assert "shorten_captions" not in run("train", "--root", people, *options).stderr


@pytest.mark.timeout(120, func_only=True)
def test_seeds_give_mean_and_spread(people: Path, work: Path) -> None:
    result = run(
        "train", "--root", people, "--output", "runs", "--epochs", 1, "--set", "warmup_epochs=0",
        "--batch-size", 16, "--seeds", 2, "--seed", 5, "--select-on", "test", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)["seeds"]
    assert summary == json.loads((work / "runs/seeds.json").read_text("utf-8"))
    found = []
    for seed in (5, 6):
        results = json.loads((work / f"runs/seed_{seed}/results.json").read_text("utf-8"))
        assert (results["seed"], results["selected_on"]) == (seed, "test")
        found.append(results["test"]["mAP"])
        card = (work / f"runs/seed_{seed}/README.md").read_text("utf-8")
        assert "test split" in card
    adapters = [work / f"runs/seed_{seed}/adapter.safetensors" for seed in (5, 6)]
    assert adapters[0].read_bytes() != adapters[1].read_bytes()
    assert summary["test"]["mAP"]["values"] == found
    assert summary["test"]["mAP"]["mean"] == pytest.approx(sum(found) / 2)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--resume", "nowhere"], 3, "--resume wants a run folder with config.yaml, found none"),
        (["--resume", "run", "--epochs", "3"], 2, "leave out other options than --device"),
        (["--resume", "run", "--set", "lr=1"], 2, "leave out other options than --device"),
        (["--root", "ROOT", "--loss", "smd"], 2, "loss 'smd' is unknown: did you mean 'sdm'"),
        (["--root", "ROOT", "--precision", "int8"], 2, "options: precision: expected one of fp32"),
        (["--root", "ROOT", "--lr", "nan"], 2, "options: lr: expected a finite number of 64 bits"),
        (["--root", "ROOT", "--precision", "fp16", "--device", "cpu"], 5, "fp16 needs a CUDA"),
        (["--root", "ROOT", "--device", "tpu"], 2, "--device must be auto, cpu or cuda"),
        (["--root", "ROOT", "--set", "model.rank=3"], 2, "unknown key 'rank'"),
        (["--root", "ROOT", "--set", "model.lora_blocks=1-99"], 2, "has 4 blocks"),
        (["--root", "ROOT", "--epochs", "0"], 2, "without any training: upperson export --base"),
        (["--root", "ROOT", "--lr", "0"], 2, "found 0.0; to search without any training: upperson"),
        (["--root", "ROOT", "--init-from", "nowhere"], 3, "expected a run folder with config.yaml"),
        (["--root", "ROOT", "--init-from", "nowhere", "--dry-run"], 3, "expected a run folder"),
        (["--root", "ROOT", "--seeds", "0"], 2, "Invalid value for '--seeds'"),
        (["--root", "ROOT", "--base", "ViT-B-16"], 2, "needs weights, found none"),
        (["--dataset", "rstpreid", "--root", "ROOT"], 3, "data_captions.json"),
    ],
)
def test_errors_are_one_line_and_a_code(
    people: Path, work: Path, arguments: list[str], code: int, message: str
) -> None:
    result = run("train", *(str(people) if word == "ROOT" else word for word in arguments))
    assert result.exit_code == code, result.stderr
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert list(work.iterdir()) == []


def test_a_part_of_a_published_set_is_trained_on_only_if_meant(work: Path) -> None:
    write_cuhk_pedes(work)
    small = ["--dataset", "cuhk-pedes", "--root", work, "--recipe", "synthetic", "--dry-run"]
    result = run("train", *small)
    assert result.exit_code == 3
    assert "split 'train' has 2 ids (published: 11003), 4 images" in result.stderr
    assert "train on what there is with --allow-partial" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    result = run("train", *small, "--allow-partial")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("setting", "edited", "message"),
    [
        ("base: upperson-small", "base: upperson-smal", "base 'upperson-smal' is unknown"),
        ("height_px: 192", "height_px: 190", "190x64 (height x width) does not divide"),
        ("dataset: jsonl", "dataset: jsom", "'jsom' is unknown, did you mean 'jsonl'?"),
        ("epochs: 2", "epochs: 0", "epochs must be at least 1, found 0"),
        ("lora_blocks: all", "lora_blocks: 1-99", "has 4 blocks"),
    ],
)
def test_a_setting_edited_in_a_run_is_a_fault_of_its_file(
    copied_run: Path, setting: str, edited: str, message: str
) -> None:
    config = copied_run / "config.yaml"
    text = config.read_text("utf-8")
    assert setting in text
    config.write_text(text.replace(setting, edited), "utf-8")
    for command in (["train", "--resume", "run"], ["evaluate", "run"], ["export", "run"]):
        result = run(*command)
        assert result.exit_code == 3, result.stderr
        assert "run/config.yaml: " in result.stderr
        assert message in result.stderr


def test_seeds_are_read_strictly(people: Path, work: Path) -> None:
    (work / "runs").mkdir()
    for text, message in (
        (
            "seeds: 0\nconfig: {root: p}",
            "seeds.yaml: seeds: expected an integer of at least 1",
        ),
        (
            "seeds: 2\nconfig: {root: p, base: 3}",
            "seeds.yaml: config.base: expected a non-empty",
        ),
        (
            "seed: 2\nconfig: {root: p}",
            "seeds.yaml: unknown key 'seed', did you mean 'seeds'?",
        ),
    ):
        (work / "runs/seeds.yaml").write_text(text, "utf-8")
        result = run("train", "--resume", "runs")
        assert result.exit_code == 3
        assert message in result.stderr


def test_processes_must_agree_on_the_run_folder(
    people: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run("train", "--root", people)
    assert result.exit_code == 2
    assert "--output is missing: several processes must agree" in result.stderr

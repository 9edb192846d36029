"""``upperson train`` as a user and a power cut meet it."""

import json

import pytest

from tests.helpers.command_line import run_code
from tests.helpers.data_sets import write_cuhk_pedes
from tests.helpers.invoke import run, run_failing, run_json
from tests.helpers.toy_bases import write_base
from upperson_synthetic import SyntheticSpec, write_dataset

RUN = ["--epochs", "2", "--batch-size", "8", "--set", "checkpoint_every=1"]
"""8 people x 2 views x 2 captions in batches of 8: two epochs of 4 steps."""


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    spec = SyntheticSpec(look="street", train_ids=8, val_ids=4, test_ids=4, views=2)
    return write_dataset(tmp_path_factory.mktemp("few") / "people", spec)


def results_of(run):
    return json.loads((run / "results.json").read_text("utf-8"))


KILLED_TWICE = """
import os, signal, sys
import upperson.train  # Once, for both.
from upperson import checkpoint
from upperson.cli import main

write = checkpoint.write_atomically

def write_until(last):
    def write_or_die(path, content):
        if path.name == f"step_{last + 1:08}.safetensors":
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, content)
    return write_or_die

for last, arguments in ((3, sys.argv[1:]), (6, ["train", "--resume", "killed"])):
    if (child := os.fork()) == 0:
        checkpoint.write_atomically, sys.argv[1:] = write_until(last), arguments
        main()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


@pytest.mark.timeout(180)
def test_a_run_killed_in_each_epoch_ends_as_one_that_was_not(people, work):
    base, weights = write_base(work / "base", "clip")
    sizes = {
        "height_px": 48, "width_px": 32, "model.prefix_length": 3, "model.prefix_blocks": "all",
        "model.lora_rank": 4, "model.adapter_reduction": 4,
    }  # fmt: skip
    train = [
        *("train", "--root", people, "--base", base, "--pretrained", weights, *RUN),
        *("--lr", "1e-6"),  # Too little to rank better: the first epoch stays the best.
        *(f"--set={name}={value}" for name, value in sizes.items()),
    ]
    whole = run(*train, "--output", "whole")
    assert whole.exit_code == 0, whole.stderr
    assert results_of(work / "whole")["best_epoch"] == 1
    killed = run_code(KILLED_TWICE, *train, "--output", "killed", cwd=work, timeout_s=120)
    assert killed.returncode == 0, killed.stderr
    assert sorted(path.name for path in (work / "killed/last").glob("step_*"))[-1] == (
        "step_00000006.safetensors"
    )
    resumed = run("train", "--resume", "killed")
    assert resumed.exit_code == 0, resumed.stderr
    assert "note: resuming at epoch" in resumed.stderr
    ours, theirs = work / "killed", work / "whole"
    for name in ("metrics.csv", "adapter.safetensors", "config.yaml"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert results_of(ours) | {"seconds": 0} == results_of(theirs) | {"seconds": 0}


def test_a_dry_run_prints_the_plan_and_writes_nothing(people, work):
    plan = ["train", "--root", people, "--dry-run", "--loss", "sdm+id"]
    result = run(*plan, "--batch-size", 6)
    assert (result.exit_code, result.stderr) == (0, "")
    assert ["train", "16", "32", "8"] in [line.split() for line in result.stdout.splitlines()]
    assert "6: 1 epoch of 6 steps of 6 pairs" in result.stdout
    activations = []
    for size in (32, 5000):
        result = run(*plan, "--batch-size", size, "--json")
        assert ("a batch of 5000" in result.stderr) == (size == 5000)
        found = json.loads(result.stdout)
        activations.append(found["memory"]["activation_bytes"])
    assert activations[0] == activations[1], "no batch is larger than the split"
    parts = {part["part"]: part["total"] for part in found["parts"]}
    assert parts["classifier"] == (128 + 1) * 8
    assert sum(parts.values()) == found["trained"]
    assert list(work.iterdir()) == []


@pytest.mark.timeout(120)
def test_seeds_give_mean_and_spread(people, work, monkeypatch):
    summary = run_json(
        "train", "--root", people, "--output", "runs", "--epochs", 1, "--set", "warmup_epochs=0",
        "--batch-size", 16, "--seeds", 2, "--seed", 5, "--select-on", "test",
    )["seeds"]  # fmt: skip
    assert summary == json.loads((work / "runs/seeds.json").read_text("utf-8"))
    runs = [work / f"runs/seed_{seed}" for seed in (5, 6)]
    results = [results_of(run) for run in runs]
    assert [(one["seed"], one["selected_on"]) for one in results] == [(5, "test"), (6, "test")]
    adapters = {(run / "adapter.safetensors").read_bytes() for run in runs}
    assert len(adapters) == 2
    values = [one["test"]["mAP"] for one in results]
    assert summary["test"]["mAP"]["values"] == values
    assert summary["test"]["mAP"]["mean"] == pytest.approx(sum(values) / 2)
    for text, key in (
        ("seeds: 0\nconfig: {root: p}", "seeds"),
        ("seeds: 2\nconfig: {root: p, base: 3}", "config.base"),
        ("seed: 2\nconfig: {root: p}", "'seed'"),
    ):
        (work / "runs/seeds.yaml").write_text(text, "utf-8")
        assert key in run_failing(3, None, "train", "--resume", "runs")["message"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    run_failing(2, "output_missing", "train", "--root", people)


def test_errors_are_one_line_and_a_code(people, work):
    root = ["--root", people]
    for status, code, *arguments in (
        (3, "not_a_run", "--resume", "nowhere"),
        (2, "options_beside_resume", "--resume", "run", "--epochs", "3"),
        (2, "options_beside_resume", "--resume", "run", "--set", "lr=1"),
        (2, "loss_unknown", *root, "--loss", "smd"),
        (2, None, *root, "--precision", "int8"),
        (2, None, *root, "--lr", "nan"),
        (5, "precision_unavailable", *root, "--precision", "fp16", "--device", "cpu"),
        (2, "device_unknown", *root, "--device", "tpu"),
        (2, None, *root, "--set", "model.rank=3"),
        (2, "blocks_out_of_range", *root, "--set", "model.lora_blocks=1-99"),
        (2, "setting_out_of_range", *root, "--epochs", "0"),
        (3, "not_a_run", *root, "--init-from", "nowhere"),
        (3, "not_a_run", *root, "--init-from", "nowhere", "--dry-run"),
        (2, "weights_missing", *root, "--base", "ViT-B-16"),
        (2, "recipe_unknown", *root, "--recipe", "syntetic"),
        (3, "dataset_not_found", *root, "--dataset", "rstpreid"),
        (2, "root_missing"),
    ):
        run_failing(status, code, "train", *arguments)
        assert list(work.iterdir()) == [], arguments
    write_cuhk_pedes(work)
    part = ["--dataset", "cuhk-pedes", "--root", work, "--recipe", "synthetic", "--dry-run"]
    run_failing(3, "counts_differ", "train", *part)
    assert run("train", *part, "--allow-partial").exit_code == 0


def test_a_setting_edited_in_a_run_is_a_fault_of_its_file(copied_run):
    config = copied_run / "config.yaml"
    text = config.read_text("utf-8")
    for setting, edited, code in (
        ("base: upperson-small", "base: upperson-smal", "base_unknown"),
        ("height_px: 192", "height_px: 190", "image_size_indivisible"),
        ("dataset: jsonl", "dataset: jsom", "dataset_unknown"),
        ("epochs: 1", "epochs: 0", "setting_out_of_range"),
        ("lora_blocks: all", "lora_blocks: 1-99", "blocks_out_of_range"),
    ):
        assert setting in text
        config.write_text(text.replace(setting, edited), "utf-8")
        for command in (["train", "--resume", "run"], ["evaluate", "run"], ["export", "run"]):
            assert "run/config.yaml: " in run_failing(3, code, *command)["message"]

"""Ways to compute the same training run: in one or two processes, in one or several parts."""

import csv
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.invoke import run
from tests.helpers.toy_clip import toy_model
from tests.helpers.toy_run import Recorder, toy_config
from tests.helpers.two_processes import in_two_processes
from upperson.components import keep_frozen_matrices_in, start_accelerator
from upperson.seeds import SEEDS_PLAN
from upperson.train import train
from upperson_rt.machine import Processor

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    # 24 pairs in batches of 7: the last batch has 3, which two processes share as 2 and 1.
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield toy_config(
            tmp_path_factory.mktemp("toy"), monkeypatch, batch_size=7, lr=3e-3, augment=True,
            mask_captions=True, loss="sdm+id", shorten_captions=0.5, wrong_captions=True,
        )  # fmt: skip


class Trained(NamedTuple):
    losses: list[float]
    run: Path


def train_here(config, run):
    recorder = Recorder()
    train(config, run, recorder, device="cpu")
    return Trained(recorder.losses, run)


@pytest.fixture(scope="module")
def one(config, tmp_path_factory):
    """The run in one process and in one part, which the others must equal."""
    found = train_here(config, tmp_path_factory.mktemp("one") / "run")
    assert len(found.losses) == 8
    return found


def assert_same_run(found, expected):
    assert found.losses == pytest.approx(expected.losses, abs=TOLERANCE, rel=TOLERANCE)
    theirs, ours = (load_file(trained.run / "adapter.safetensors") for trained in (expected, found))
    for name, tensor in ours.items():
        # Adam divides by the size of a gradient and so enlarges rounding differences.
        torch.testing.assert_close(tensor, theirs[name], atol=1e-4, rtol=1e-3)


def test_two_processes_train_as_one(config, one, tmp_path):
    seeds, recipe = tmp_path / "seeds", tmp_path / "config.yaml"
    short = replace(config, epochs=1, cache=str(tmp_path / "cache"))
    recipe.write_text(short.to_yaml(), "utf-8")

    def work(rank):
        found = [
            train_here(replace(config, accumulate=parts), tmp_path / f"{parts}_parts")
            for parts in (1, 2)
        ]
        while rank == 1 and not (seeds / SEEDS_PLAN).is_file():
            time.sleep(0.01)  # The second process comes when the first has begun to write.
        done = run(
            "train", "--root", config.root, "--recipe", recipe, "--output", seeds,
            "--device", "cpu", "--seeds", 2,
        )  # fmt: skip
        assert done.exit_code == 0, done.stderr
        return found

    main, other = in_two_processes(work)
    assert [trained.losses for trained in other] == [[], []]
    for trained in main:
        assert_same_run(trained, one)
    summary = json.loads((seeds / "seeds.json").read_text("utf-8"))
    assert summary["seeds"] == [1, 2]
    first = seeds / "seed_1"
    results = json.loads((first / "results.json").read_text("utf-8"))
    assert results["val"]["R@1"] == pytest.approx(summary["val"]["R@1"]["values"][0])
    # The first seed is the first epoch of the run in one process.
    theirs, ours = (
        next(csv.DictReader((folder / "metrics.csv").read_text("utf-8").splitlines()))["loss"]
        for folder in (one.run, first)
    )
    assert float(ours) == pytest.approx(float(theirs), abs=TOLERANCE, rel=TOLERANCE)


@pytest.mark.parametrize(
    "changes",
    [{"accumulate": 20}, {"checkpoint_activations": True}, {"workers": 2, "cache": "cache"}],
    ids=["more parts than pairs", "activations recomputed", "two workers, a cache"],
)
def test_the_way_of_computing_does_not_change_the_run(config, one, tmp_path, changes, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_same_run(train_here(replace(config, **changes), tmp_path / "run"), one)


def test_frozen_matrices_in_bf16_change_no_bit_of_autocast_training():
    start_accelerator("fp32", "cpu")
    gradients = []
    for keep in (False, True):
        model = toy_model()
        if keep:
            keep_frozen_matrices_in(model, "bf16")
        images = torch.randn(3, 3, *model.image_size, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16):
            image, text = model(images, torch.tensor([[49406, 5, 6, 49407]] * 3))
        (image.float().square().sum() + text.float().sum()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        kept = {p.dtype for p in model.parameters() if not p.requires_grad}
        assert kept == ({torch.float32, torch.bfloat16} if keep else {torch.float32})
    torch.testing.assert_close(*gradients, atol=0, rtol=0)
    assert {gradient.dtype for gradient in gradients[0].values()} == {torch.float32}


def test_bf16_training_follows_fp32_and_saves_float32(config, one, tmp_path, monkeypatch):
    # Without instructions for it a step of the toy is quick all the same.
    able = Processor("x", frozenset({"avx512_bf16"}))
    monkeypatch.setattr("upperson.components.processor", lambda: able)
    half = train_here(replace(config, precision="bf16"), tmp_path / "run")
    assert half.losses == pytest.approx(one.losses, rel=0.05)
    assert half.losses != one.losses
    state = load_file(half.run / "adapter.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}

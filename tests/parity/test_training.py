"""Ways to compute the same training run: in one or two processes, in one or several parts."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.toy_clip import toy_model
from tests.helpers.toy_run import Recorder, toy_config
from upperson.components import keep_frozen_matrices_in, start_accelerator
from upperson.config import TrainConfig
from upperson.train import train

TOLERANCE = 1e-5


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    # 24 pairs in batches of 7: the last batch has 3, which two processes share as 2 and 1.
    return toy_config(
        tmp_path,
        monkeypatch,
        batch_size=7,
        lr=3e-3,
        augment=True,
        mask_captions=True,
        loss="sdm+id",
    )


def losses_of(config: TrainConfig, run: Path) -> list[float]:
    recorder = Recorder()
    train(config, run, recorder, device="cpu")
    return recorder.losses


def assert_same_run(first: Path, second: Path) -> None:
    ours, theirs = (load_file(run / "adapter.safetensors") for run in (first, second))
    for name, tensor in ours.items():
        # Adam divides by the size of a gradient and so enlarges rounding differences.
        torch.testing.assert_close(tensor, theirs[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}], ids=["whole", "in two parts"])
def test_two_processes_train_as_one(
    config: TrainConfig, tmp_path: Path, changes: dict[str, int]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(replace(config, **changes).to_yaml(), "utf-8")
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "--module", "tests.helpers.train_process", file, tmp_path / "two", tmp_path / "losses",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "losses").read_text("utf-8"))
    one = losses_of(config, tmp_path / "one")
    assert len(one) == 8
    assert two == pytest.approx(one, abs=TOLERANCE, rel=TOLERANCE)
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    "changes",
    [{"accumulate": 3}, {"accumulate": 20}, {"checkpoint_activations": True}, {"workers": 2}],
    ids=["three parts", "more parts than pairs", "activations recomputed", "two workers"],
)
def test_the_way_of_computing_does_not_change_the_run(
    config: TrainConfig, tmp_path: Path, changes: dict[str, int | bool]
) -> None:
    one = losses_of(config, tmp_path / "one")
    other = losses_of(replace(config, **changes), tmp_path / "other")
    assert other == pytest.approx(one, abs=TOLERANCE, rel=TOLERANCE)
    assert_same_run(tmp_path / "one", tmp_path / "other")


def test_frozen_matrices_in_bf16_change_no_bit_of_autocast_training() -> None:
    start_accelerator("fp32", "cpu")
    gradients = []
    for keep in (False, True):
        model = toy_model()
        if keep:
            keep_frozen_matrices_in(model, "bf16")
        images = torch.randn(3, 3, *model.image_size, generator=torch.Generator().manual_seed(0))
        ids = torch.tensor([[49406, 5, 6, 49407]] * 3)
        with torch.autocast("cpu", torch.bfloat16):
            image, text = model(images, ids)
        (image.float().square().sum() + text.float().sum()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        kept = {p.dtype for p in model.parameters() if not p.requires_grad}
        assert kept == ({torch.float32, torch.bfloat16} if keep else {torch.float32})
    assert all(gradient.dtype == torch.float32 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=0, rtol=0)


def test_bf16_training_follows_fp32_and_saves_float32(config: TrainConfig, tmp_path: Path) -> None:
    one = losses_of(config, tmp_path / "one")
    half = losses_of(replace(config, precision="bf16"), tmp_path / "half")
    assert half == pytest.approx(one, rel=0.05)
    assert half != one
    state = load_file(tmp_path / "half/adapter.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}

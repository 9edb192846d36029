"""The benchmark of augmentation: which runs it makes, and how pictures are prepared in each."""

import json

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import augmentation
from upperson.data import batches
from upperson.data.transforms import CLIP_STATISTICS, prepare_pixels
from upperson.run import RESULTS


@pytest.fixture
def trained(monkeypatch):
    """Runs that were asked for, by folder, with what prepares their pictures."""
    runs = {}

    def train(config, run, observer, *, device, resume):
        runs[run.name] = config, batches.prepare_pixels
        run.mkdir(parents=True)
        (run / RESULTS).write_text(json.dumps({"test": {"R@1": float(len(runs))}}))

    monkeypatch.setattr("benchmarks.runs.train", train)
    monkeypatch.setattr("benchmarks.runs.write_dataset", lambda folder, spec: folder)
    return runs


def test_runs_of_a_seed_differ_in_their_augmentation_alone(trained, tmp_path):
    arguments = ["--seeds", "2", "--output", str(tmp_path), "--json"]
    result = CliRunner().invoke(augmentation.app, arguments)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    literal, ours, none = augmentation.CONTENDERS
    assert found["test_r1"] == {literal: [1, 4], ours: [2, 5], none: [3, 6]}
    assert found["against_torchvision"][ours] == {
        "mean": 3.5, "difference": 1, "half_interval": 0
    }  # fmt: skip
    for seed in (1, 2):
        made = [trained[f"{name}, seed {seed}"] for name in augmentation.CONTENDERS]
        assert {config.seed for config, _ in made} == {seed}
        assert [config.augment for config, _ in made] == [True, True, False]
        prepares = [prepare for _, prepare in made]
        assert prepares == [augmentation.one_at_a_time, prepare_pixels, prepare_pixels]
    assert batches.prepare_pixels is prepare_pixels
    shown = CliRunner().invoke(augmentation.app, arguments[:-1])  # Finished runs are read.
    assert shown.exit_code == 0, shown.stderr
    assert len(trained) == 6
    last = [line.split()[-3:] for line in shown.stdout.splitlines()[-2:]]
    assert last == [["3.50", "+1.00", "0.00"], ["4.50", "+2.00", "0.00"]]


def test_torchvision_draws_for_each_picture_and_evaluation_stays_as_it_is():
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (1, 24, 16, 3), dtype=torch.uint8).expand(8, -1, -1, -1)
    augmented = augmentation.one_at_a_time(pixels, torch.zeros(8, 7), CLIP_STATISTICS)
    assert augmented.shape == (8, 3, 24, 16)
    assert augmented.dtype == torch.float32
    assert len({picture.numpy().tobytes() for picture in augmented}) > 1
    plain = augmentation.one_at_a_time(pixels, None, CLIP_STATISTICS)
    torch.testing.assert_close(plain, prepare_pixels(pixels, None, CLIP_STATISTICS))

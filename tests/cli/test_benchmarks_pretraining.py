"""The benchmark of starts: which runs it makes, and what it reads of them. Nothing is trained."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks import pretraining
from upperson.run import RESULTS


@pytest.fixture
def trained(monkeypatch):
    """Runs that were asked for, by folder; each gets a result that tells it from the others."""
    runs = {}

    def train(config, run, observer, *, device, resume):
        assert not resume
        runs[f"{run.parent.name}/{run.name}"] = config
        run.mkdir(parents=True)
        (run / RESULTS).write_text(json.dumps({"test": {"R@1": float(len(runs))}}))

    monkeypatch.setattr("benchmarks.runs.train", train)
    monkeypatch.setattr(pretraining, "write_dataset", lambda folder, spec: folder)
    monkeypatch.setattr(pretraining, "_zero_shot", lambda folder, people: 5.5)
    monkeypatch.setattr(pretraining, "_measured", lambda run, people: 6.5)
    return runs


def test_runs_of_a_seed_differ_in_their_start_alone(trained, tmp_path):
    arguments = ["--seeds", "2", "--output", str(tmp_path), "--json"]
    result = CliRunner().invoke(pretraining.app, arguments)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["test_r1"] == {
        "0": {"fresh": [5.5], "from other people": [6.5, 6.5]},
        "50": {"fresh": [2.0, 7.0], "from other people": [3.0, 8.0]},
        "500": {"fresh": [4.0, 9.0], "from other people": [5.0, 10.0]},
    }
    assert len(trained) == 10
    for seed in (1, 2):
        others = trained[f"seed_{seed}/others"]
        assert (others.seed, others.init_from) == (seed, None)
        for count in (50, 500):
            fresh = trained[f"seed_{seed}/fresh_{count}"]
            started = trained[f"seed_{seed}/pretrained_{count}"]
            assert fresh.init_from is None
            assert started.init_from == str(tmp_path / f"seed_{seed}/others")
            assert fresh.root == started.root != others.root
            assert fresh.seed == started.seed == seed
            assert fresh.epochs == started.epochs
    again = CliRunner().invoke(pretraining.app, arguments)  # Finished runs are read.
    assert json.loads(again.stdout)["test_r1"] == found["test_r1"]
    assert len(trained) == 10
    shown = CliRunner().invoke(pretraining.app, arguments[:-1])
    assert shown.exit_code == 0, shown.stderr
    assert [line.split()[:2] for line in shown.stdout.splitlines()[-3:]] == [
        ["0", "5.50"], ["50", "4.50"], ["500", "6.50"]
    ]  # fmt: skip

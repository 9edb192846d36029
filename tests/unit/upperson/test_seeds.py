"""Mean and spread over seeds."""

import json

import pytest
from rich.console import Console

from tests.helpers.refused import refused
from upperson.cli.train import seeds_table
from upperson.seeds import summarise
from upperson_rt.errors import InputError


def result(seed, r1):
    return {"seed": seed, "best_epoch": seed + 4, "val": None, "test": {"R@1": r1, "mAP": 2 * r1}}


def test_mean_and_sample_deviation():
    found = summarise([result(3, 10.0), result(4, 14.0), result(5, 9.0)])
    assert (found["seeds"], found["best_epochs"], found["val"]) == ([3, 4, 5], [7, 8, 9], None)
    r1 = found["test"]["R@1"]
    assert r1["mean"] == pytest.approx(11)
    assert r1["std"] == pytest.approx(((1 + 9 + 4) / 2) ** 0.5)
    assert (r1["min"], r1["max"], r1["values"]) == (9.0, 14.0, [10.0, 14.0, 9.0])
    assert found["test"]["mAP"]["mean"] == pytest.approx(22)
    assert json.loads(json.dumps(found)) == found


def test_a_single_run_has_no_deviation_and_other_runs_are_refused():
    found = summarise([result(1, 50.0)])
    assert (found["test"]["R@1"]["std"], found["test"]["R@1"]["mean"]) == (None, 50.0)
    with refused("no_runs", InputError):
        summarise([])
    for split, other in (("test", None), ("val", {"R@1": 1.0})):
        with refused("runs_differ", InputError, split=split, run=2):
            summarise([result(1, 1.0), result(2, 1.0) | {split: other}])


def test_the_table_shows_every_run_mean_and_deviation():
    runs = [result(1, 40.0) | {"val": {"R@1": 60.0, "mAP": 50.0}} for _ in range(2)]
    runs[1] = runs[1] | {"seed": None, "test": {"R@1": 44.0, "mAP": 81.0}}
    console = Console(width=100, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(seeds_table(summarise(runs)))
    assert [line.split() for line in capture.get().splitlines()] == [
        ["seed", "R@1", "mAP"],
        ["val", "1", "60.00", "50.00"],
        ["?", "60.00", "50.00"],
        ["mean", "60.00", "50.00"],
        ["std", "0.00", "0.00"],
        ["test", "1", "40.00", "80.00"],
        ["?", "44.00", "81.00"],
        ["mean", "42.00", "80.50"],
        ["std", "2.83", "0.71"],
    ]

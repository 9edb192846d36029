"""Mean and spread over seeds."""

import json
from typing import Any

import pytest
from rich.console import Console

from upperson.cli.train import seeds_table
from upperson.seeds import summarise
from upperson_rt.errors import InputError


def result(seed: int, r1: float) -> dict[str, Any]:
    return {"seed": seed, "best_epoch": seed + 4, "val": None, "test": {"R@1": r1, "mAP": 2 * r1}}


def test_mean_and_sample_deviation() -> None:
    found = summarise([result(3, 10.0), result(4, 14.0), result(5, 9.0)])
    assert found["seeds"] == [3, 4, 5]
    assert found["best_epochs"] == [7, 8, 9]
    assert found["val"] is None
    r1 = found["test"]["R@1"]
    assert r1["mean"] == pytest.approx(11)
    assert r1["std"] == pytest.approx(((1 + 9 + 4) / 2) ** 0.5)
    assert (r1["min"], r1["max"], r1["values"]) == (9.0, 14.0, [10.0, 14.0, 9.0])
    assert found["test"]["mAP"]["mean"] == pytest.approx(22)
    assert json.loads(json.dumps(found)) == found


def test_a_single_run_has_no_deviation() -> None:
    found = summarise([result(1, 50.0)])
    assert found["test"]["R@1"]["std"] is None
    assert found["test"]["R@1"]["mean"] == 50.0


def test_runs_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(InputError, match="at least one run, found none"):
        summarise([])
    with pytest.raises(InputError, match=r"of test .* found R@1, mAP in run 1 and none in run 2"):
        summarise([result(1, 1.0), result(2, 1.0) | {"test": None}])
    with pytest.raises(InputError, match=r"of val .* found none in run 1 and R@1 in run 2"):
        summarise([result(1, 1.0), result(2, 1.0) | {"val": {"R@1": 1.0}}])


def test_the_table_shows_every_run_mean_and_deviation() -> None:
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

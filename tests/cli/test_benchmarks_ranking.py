"""``python -m benchmarks.ranking`` on few embeddings."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from benchmarks import ranking
from upperson_rt.errors import IntegrityError

FEW = ("--queries", "40", "--images", "60", "--people", "7", "--dim", "16")


def test_metrics_are_those_of_sorting_with_any_number_of_threads() -> None:
    result = CliRunner().invoke(ranking.app, [*FEW, "--threads", "2", "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["runs"]
    assert [(run["name"], run["threads"]) for run in found] == [
        (ranking.SORTED, 1), (ranking.OURS, 1), (ranking.OURS, 2),
    ]  # fmt: skip
    assert found[0]["metrics"] == pytest.approx(found[1]["metrics"])
    assert 10 < found[0]["metrics"]["R@1"] < 100
    assert all(run["cpu_ms"] > 0 for run in found)
    table = CliRunner().invoke(ranking.app, [*FEW, "--threads", "1"])
    assert table.exit_code == 0, table.stderr
    assert table.stdout.count("ours") == 1
    with pytest.raises(IntegrityError, match="measures otherwise"):
        ranking.require_equal([found[0], found[1] | {"metrics": {**found[0]["metrics"], "mAP": 0}}])

"""``python -m benchmarks.tracking`` at a size for tests."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from upperson.data.synthetic.video import Street, VideoSpec
from upperson_rt.camera.tracker import TRACKERS
from upperson_rt.errors import install_command

pytest.importorskip("trackers", reason=f"run  {install_command('trackers')}")
tracking = pytest.importorskip("benchmarks.tracking")


def test_all_trackers_are_compared_at_all_rates():
    arguments = ("--streets", "1", "--people", "6", "--seconds", "4")
    result = CliRunner().invoke(tracking.app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["scores"]
    assert {(row["detector"], row["fps"], row["tracker"]) for row in rows} == {
        (detector, fps, tracker)
        for detector in tracking.NOISES
        for fps in tracking.RATES
        for tracker in TRACKERS
    }
    for row in rows:
        assert 0 <= row["HOTA"] <= 100
        assert 0 <= row["IDF1"] <= 100
    ours = [row for row in rows if row["tracker"] == "upperson" and row["detector"] == "mild"]
    assert min(row["IDF1"] for row in ours) > 60


def test_boxes_are_missed_moved_and_made_up_as_said():
    spec = VideoSpec(people=10, seconds=20, seed=1, busy=True)
    street, found = Street(spec), {}
    moments = [(step / 2, street.sightings(step / 2)) for step in range(40)]
    for name, noise in tracking.NOISES.items():
        rows = [tracking.detect(seen, time_s, noise, spec) for time_s, seen in moments]
        again = [tracking.detect(seen, time_s, noise, spec) for time_s, seen in moments]
        assert all(np.array_equal(*both) for both in zip(rows, again, strict=True))
        found[name] = sum(map(len, rows))
    there = sum(one.visible >= 0.7 for _, seen in moments for one in seen)
    assert 0.85 * there < found["mild"] < 1.2 * there
    empty = [tracking.detect([], time_s, tracking.NOISES["strong"], spec) for time_s, _ in moments]
    assert 5 < sum(map(len, empty)) < 30

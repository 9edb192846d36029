"""A few kills; `python -m tests.helpers.alert_kills` does a hundred."""

import pytest

from tests.helpers.alert_kills import run_trial


@pytest.mark.timeout(180)
def test_nothing_is_lost_when_processes_are_killed(tmp_path):
    pytest.importorskip("paho.mqtt.client")
    counts, wrong = run_trial(tmp_path, alerts=200, kills=3, seed=1)
    assert wrong == []
    assert counts["kill -9"] == 3
    assert counts["http: different"] == counts["mqtt: different"] == 200

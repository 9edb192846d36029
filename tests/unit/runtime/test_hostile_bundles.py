"""Bundles with right hashes that no export writes: no library gets what is in them."""

import faulthandler
import shutil
import time

import pytest

from tests.helpers import hostile_bundles
from tests.helpers.hostile_bundles import BACKENDS, HOSTILE, try_bundle
from tests.helpers.toy_bundle import make_toy_bundle
from upperson_rt.printable import printable


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_toy_bundle(tmp_path_factory.mktemp("sound") / "bundle")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sound_one_is_taken(sound, backend):
    assert try_bundle(sound, backend) == "taken"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_it_is_refused(sound, tmp_path, change, backend):
    folder = shutil.copytree(sound, tmp_path / "bundle")
    change(folder)
    said = try_bundle(folder, backend)
    assert said.startswith(("5 ", "6 ")), said
    assert len(printable(said)) < 2000


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_trial_that_hangs_is_ended_and_named(sound, monkeypatch):
    monkeypatch.setattr(hostile_bundles, "WALL_S", 2.0)
    monkeypatch.setattr(hostile_bundles, "try_bundle", lambda folder, backend: time.sleep(600))
    at_once = faulthandler.dump_traceback_later

    def later(*arguments, **options):
        time.sleep(0.5)  # Others had the processor.
        at_once(*arguments, **options)

    monkeypatch.setattr(faulthandler, "dump_traceback_later", later)
    said, seconds, _ = hostile_bundles.in_process(sound, BACKENDS[0])
    assert said.startswith("hung for 2 s")
    assert "most recent call first" in said
    assert seconds < 30

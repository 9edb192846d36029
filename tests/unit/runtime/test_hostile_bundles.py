"""Bundles with right hashes that no export writes: no library gets what is in them."""

import shutil

import pytest

from tests.helpers.hostile_bundles import HOSTILE, try_bundle
from tests.helpers.toy_bundle import make_toy_bundle
from upperson_rt.printable import printable


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_toy_bundle(tmp_path_factory.mktemp("sound") / "bundle")


def test_the_sound_one_is_taken(sound):
    assert try_bundle(sound) == "taken"


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_it_is_refused(sound, tmp_path, change):
    folder = shutil.copytree(sound, tmp_path / "bundle")
    change(folder)
    said = try_bundle(folder)
    assert said.startswith(("5 ", "6 ")), said
    assert len(printable(said)) < 2000

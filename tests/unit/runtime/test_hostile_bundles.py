"""Bundles with right hashes that no export writes: no library gets what is in them."""

import shutil
from types import SimpleNamespace

import pytest

from tests.helpers.hostile_bundles import BACKENDS, HOSTILE, try_bundle
from tests.helpers.hostile_tokenizers import TOKENIZERS
from tests.helpers.toy_bundle import make_toy_bundle
from upperson_rt.bundle import Bundle
from upperson_rt.errors import IntegrityError
from upperson_rt.printable import escape_for_display


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
    assert len(escape_for_display(said)) < 2000


@pytest.mark.parametrize("change", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_foreign_tokenizer_never_reaches_the_library(sound, tmp_path, monkeypatch, change):
    folder = shutil.copytree(sound, tmp_path / "bundle")
    change(folder)
    monkeypatch.setattr(
        "tokenizers.Tokenizer", SimpleNamespace(from_str=lambda _: pytest.fail("read"))
    )
    with pytest.raises(IntegrityError):
        Bundle.open(folder)

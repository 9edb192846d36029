"""A toy encoder, pictures that it distinguishes, and a gallery for them."""

import shutil

import pytest

from tests.helpers.toy_bundle import COLOURS, draw_person, make_toy_bundle
from upperson_rt.bundle import open_encoder
from upperson_rt.gallery import Gallery


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory):
    """A bundle that no test changes."""
    return make_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture
def folder(toy_bundle, tmp_path):
    """A bundle that a test may change."""
    return shutil.copytree(toy_bundle, tmp_path / "bundle")


@pytest.fixture(scope="session")
def encoder(toy_bundle):
    return open_encoder(toy_bundle, threads=1)


@pytest.fixture
def pictures(tmp_path):
    return [draw_person(tmp_path / f"{colour}.png", colour) for colour in COLOURS]


@pytest.fixture
def gallery(tmp_path, encoder):
    path = tmp_path / "gallery"
    with Gallery.open(path, encoder.fingerprint, encoder.embed_dim, create=True) as store:
        yield store

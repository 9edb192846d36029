"""A toy encoder, pictures it tells apart, and a gallery for them."""

import pytest

from tests.helpers.toy_bundle import COLOURS, draw_person, make_toy_bundle
from upperson_rt.bundle import open_encoder
from upperson_rt.gallery import Gallery


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    return open_encoder(make_toy_bundle(tmp_path_factory.mktemp("encoder") / "bundle"), threads=1)


@pytest.fixture
def pictures(tmp_path):
    return [draw_person(tmp_path / f"{colour}.png", colour) for colour in COLOURS]


@pytest.fixture
def gallery(tmp_path, encoder):
    path = tmp_path / "gallery"
    with Gallery.open(path, encoder.fingerprint, encoder.embed_dim, create=True) as store:
        yield store

"""What the tests of cameras share: a toy model, its encoder, and an empty gallery."""

import pytest

import upperson_rt
from tests.helpers.fake_camera import FakeTime
from tests.helpers.toy_bundle import make_toy_bundle
from upperson_rt.gallery import Gallery


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    return make_toy_bundle(tmp_path_factory.mktemp("camera") / "bundle")


@pytest.fixture
def encoder(bundle):
    return upperson_rt.open(bundle, "fp32", "onnxruntime", threads=1)


@pytest.fixture
def gallery(tmp_path, encoder):
    with Gallery.open(
        tmp_path / "gallery", encoder.fingerprint, encoder.embed_dim, create=True
    ) as opened:
        yield opened


@pytest.fixture
def fake_time(monkeypatch):
    """The clock of what reads sources, which can be set forward."""
    found = FakeTime()
    monkeypatch.setattr("upperson_camera.capture.time", found)
    return found

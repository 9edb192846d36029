"""What tests of the command lines start from."""

import shutil

import pytest

from tests.helpers.browser import launched
from tests.helpers.toy_bundle import COLOURS, draw_person, make_toy_bundle
from upperson_rt.bundle import open_encoder
from upperson_rt.gallery import Gallery
from upperson_rt.ingest.files import index_images


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def enter(tmp_path, monkeypatch):
    """Copies a folder and makes the copy the working folder."""

    def enter(original):
        monkeypatch.chdir(shutil.copytree(original, tmp_path / "work"))
        return tmp_path / "work"

    return enter


@pytest.fixture(scope="session")
def bundle_and_crops(tmp_path_factory):
    """A folder with ./bundle, of two small towers, and ./crops, a person in each colour."""
    folder = tmp_path_factory.mktemp("cli")
    make_toy_bundle(folder / "bundle")
    (folder / "crops").mkdir()
    for colour in COLOURS:
        draw_person(folder / "crops" / f"{colour}.png", colour)
    return folder


@pytest.fixture(scope="session")
def gallery_of_crops(bundle_and_crops, tmp_path_factory):
    """A gallery of these crops, a picture in each colour; no test changes it."""
    encoder = open_encoder(bundle_and_crops / "bundle", threads=1)
    folder = tmp_path_factory.mktemp("indexed") / "gallery"
    with Gallery.open(folder, encoder.fingerprint, encoder.embed_dim, create=True) as gallery:
        index_images(encoder, gallery, sorted((bundle_and_crops / "crops").iterdir()))
    return folder


@pytest.fixture(scope="session")
def people(demo_folder):
    """The street people of the quick demo."""
    (root,) = (demo_folder / "people").glob("street-*")
    return root


@pytest.fixture(scope="session")
def site(demo_folder):
    """A site of the quick demo, with its run, bundle and gallery."""
    return demo_folder / "sites/station"


@pytest.fixture(scope="session")
def site_people(demo_folder):
    """The people of that site."""
    (root,) = (demo_folder / "people").glob("station-*")
    return root


@pytest.fixture(scope="session")
def toy_run(people, tmp_path_factory):
    """The run of a toy on the demo's people; to export it takes a quarter of what the demo's does.

    The demo's own run is exported by the demo.
    """
    from tests.helpers.toy_run import write_toy_run  # Takes torch with it.

    return write_toy_run(tmp_path_factory.mktemp("toy"), people)


@pytest.fixture
def copied_run(site, work):
    return shutil.copytree(site / "run", work / "run")


@pytest.fixture(scope="module")
def browser():
    with launched() as opened:
        yield opened

"""A location chooses its store."""

from types import SimpleNamespace

import pytest

from tests.helpers.gallery_places import DIM, FINGERPRINT
from tests.helpers.refused import refused
from upperson_rt.errors import InputError
from upperson_rt.gallery import Gallery


class Elsewhere:
    """As much of a third store as opening needs."""

    fingerprint, embed_dim = FINGERPRINT, DIM

    @classmethod
    def _open(cls, *arguments):
        opened = cls()
        opened.arguments = arguments
        return opened


def test_another_store_is_found_by_its_entry_point(monkeypatch):
    found = {"stores": {"elsewhere": [SimpleNamespace(value="a:b", load=lambda: Elsewhere)]}}
    monkeypatch.setattr("upperson_rt.extensions._entry_points", lambda group: found[group])
    location = "elsewhere://place/people"
    assert Gallery.open(location).arguments == (location, None)
    made = Gallery.open(location, FINGERPRINT, DIM, create=True)
    assert made.arguments == (location, (FINGERPRINT, DIM))


@pytest.mark.parametrize("location", ["nowhere://place/people", "milvus", "milvus:people"])
def test_what_names_no_store_is_a_folder(tmp_path, monkeypatch, location):
    monkeypatch.chdir(tmp_path)
    with refused("gallery_not_found", InputError, near=None):
        Gallery.open(location)
    Gallery.open(location, FINGERPRINT, DIM, create=True).close()
    assert (tmp_path / location / "gallery.sqlite").is_file()

"""Files of an earlier release are opened, searched, checked and added to.

Commit fb9b085 made them, from the toy bundle; they are never written anew.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from upperson_rt.bundle import Bundle
from upperson_rt.gallery import Filter, Gallery, Item

FILES = Path(__file__).parent / "fb9b085"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FILES / "gallery", tmp_path / "gallery")


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_an_earlier_bundle_searches_an_earlier_gallery(folder, variant):
    bundle = Bundle.open(FILES / "bundle", variant)
    bundle.check_files()
    encoder = bundle.encoder()
    with Gallery.open(folder, encoder.fingerprint, encoder.embed_dim) as gallery:
        for colour in ("red", "green", "yellow"):
            queries = encoder.encode_texts([f"a woman in a {colour} coat"])
            for where in (None, Filter(since=1.7e9)):
                (hits,) = gallery.search(queries, 2, where)
                assert {hit.item.key.partition("-")[0] for hit in hits} == {colour}
        assert encoder.encode_images([np.zeros((192, 64, 3), np.uint8)]).shape == (1, 16)


def test_an_earlier_gallery_is_read_and_added_to(folder):
    with Gallery.open(folder) as gallery, Gallery.open(folder) as other:
        assert gallery.verify() == []
        gallery.check()
        info = gallery.info()
        assert (info.schema_version, info.items, info.tracks) == (3, 11, 9)
        assert (info.cameras, info.variants) == ({"gate": 4, "hall": 4}, {"fp32": 11})
        ((item, vector),) = gallery.get([3]).values()
        assert (item.key, item.camera, item.box) == ("blue-2", None, (0, 0, 64, 192))
        before = gallery.search(vector[None], 20)
        assert other.search(vector[None], 20) == before
        assert gallery.add([Item(key="new", camera="gate")], vector[None]) == []
        assert gallery.add([item], vector[None]) == ["blue-2"]
        assert gallery.delete(["new"]) == 1
        for opened in (gallery, other):
            assert opened.search(vector[None], 20) == before
            assert opened.count(Filter(camera="gate")) == 4
            assert opened.info().schema_version == 4
        other.add([item], vector[None])
    with Gallery.open(folder) as gallery:
        assert gallery.verify() == []
        assert gallery.search(vector[None], 20) == before

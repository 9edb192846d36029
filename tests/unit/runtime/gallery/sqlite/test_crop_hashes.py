"""The name of a crop has a hash of its content, and what is not that content is found."""

import os

import numpy as np
import pytest

from tests.helpers import crop_damage
from tests.helpers.gallery_places import DIM, FINGERPRINT, some_vectors
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.gallery import Gallery, Hit, Item
from upperson_rt.gallery.crops import has_hash, name_with_hash, read_crop
from upperson_rt.sheet import draw_sheet


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crops") / "gallery"
    with Gallery.open(folder, FINGERPRINT, DIM, create=True) as gallery:
        yield gallery, crop_damage.fill(gallery, 4)


@pytest.mark.parametrize("kind", crop_damage.KINDS)
def test_a_crop_that_was_altered_is_found(filled, kind):
    gallery, files = filled
    assert crop_damage.missed(gallery, files, kind, np.random.default_rng(0)) == []
    assert gallery.verify() == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / name_with_hash("a", b"picture"))
    with pytest.raises(IntegrityError):
        read_crop(tmp_path / name_with_hash("a", b"picture"))


def test_a_file_beyond_all_crops_is_not_read_through(tmp_path):
    crop = tmp_path / name_with_hash("a", b"picture")
    with crop.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(IntegrityError):
        read_crop(crop)
    with pytest.raises(InputError):
        read_crop(tmp_path / name_with_hash("missing", b"picture"))


@pytest.mark.parametrize(
    "name", ["gate/2026-11-26/101112-345-0123456789ab.jpg", "a.sha256-0123.jpg", "0" * 32 + ".jpg"]
)
def test_a_name_without_a_hash_is_not_taken_for_one(tmp_path, name):
    assert not has_hash(name)
    assert read_crop(tmp_path / name) is None
    assert has_hash(name_with_hash("a", b"picture"))


def test_an_altered_crop_is_not_drawn(filled, tmp_path):
    gallery, files = filled
    hits = [
        Hit(id=number, score=0.5, item=item) for number, item in enumerate(gallery.items(), start=1)
    ]
    sound = draw_sheet("a coat", hits[:1], crops_dir=gallery.crops_dir)
    before = files[0].read_bytes()
    files[0].write_bytes(files[1].read_bytes())
    try:
        altered = draw_sheet("a coat", hits[:1], crops_dir=gallery.crops_dir)
        missing = draw_sheet("a coat", hits[:1], crops_dir=tmp_path)
    finally:
        files[0].write_bytes(before)
    grey = (203, 207, 212)
    found = [image.getpixel((60, 300)) == grey for image in (sound, altered, missing)]
    assert found == [False, True, True]


def test_a_crop_that_is_only_missing_does_not_keep_others_from_an_export(tmp_path):
    from upperson_rt.gallery.export import export_gallery

    with Gallery.open(tmp_path / "gallery", FINGERPRINT, DIM, create=True) as gallery:
        gallery.add([Item(key="a", crop=name_with_hash("a", b"picture"))], some_vectors(1))
        assert export_gallery(gallery, tmp_path / "exported").items == 1

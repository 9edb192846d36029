"""Pictures that a gallery holds already, under the name of another folder."""

import logging
import os
import shutil

import pytest

from upperson_rt.ingest.files import index_images

LOGGER = "upperson_rt.ingest.files"


@pytest.fixture
def tracks(tmp_path, pictures):
    """A folder with numbered pictures of three tracks, as one machine has it."""
    for number, picture in enumerate(pictures):
        place = tmp_path / "nas" / "pictures" / f"t{number % 3}" / f"{number // 3:03d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, place)
    return tmp_path / "nas" / "pictures"


def warnings_of(caplog, encoder, gallery, folder, **options):
    caplog.clear()
    with caplog.at_level(logging.WARNING, LOGGER):
        index_images(encoder, gallery, sorted(folder.rglob("*.png")), **options)
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


def test_another_mount_point_is_noticed(encoder, gallery, tracks, caplog, tmp_path):
    assert warnings_of(caplog, encoder, gallery, tracks) == []
    assert warnings_of(caplog, encoder, gallery, tracks) == [], "the same again"
    moved = tmp_path / "srv" / "archive"
    moved.parent.mkdir()
    tracks.rename(moved)
    (text,) = warnings_of(caplog, encoder, gallery, moved)
    assert f"6 of 6 of these pictures by the same names in {tracks}" in text
    assert f" {moved}:" in text
    assert warnings_of(caplog, encoder, gallery, moved) == [], "now it has both"
    (tmp_path / "link").symlink_to(moved)
    (text,) = warnings_of(caplog, encoder, gallery, tmp_path / "link")
    assert f" {tmp_path / 'link'}:" in text


@pytest.mark.parametrize("same", ["names", "camera", "time"])
def test_other_pictures_of_the_same_names_are_none(
    same, encoder, gallery, tracks, caplog, tmp_path
):
    options = {"camera": "gate", "time_from": "mtime"}
    assert warnings_of(caplog, encoder, gallery, tracks, **options) == []
    others = shutil.copytree(tracks, tmp_path / "hall" / "pictures")
    if same != "names":  # As on another machine, where the first ones are not to be seen.
        shutil.rmtree(tracks)
    if same == "camera":
        options["camera"] = "hall"
    if same == "time":
        for picture in others.rglob("*.png"):
            os.utime(picture, (1e9, 1e9))
    assert warnings_of(caplog, encoder, gallery, others, **options) == []
    assert gallery.count() == 12

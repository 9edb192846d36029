"""Pictures that a gallery holds already, under the name of another folder."""

import logging
import os
import shutil

import numpy as np
import pytest

from upperson_rt.gallery import Item
from upperson_rt.ingest import files as indexer
from upperson_rt.ingest.files import Elsewhere, _apart, find_elsewhere, index_images

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


def test_people_found_in_pictures_count_and_most_pictures_must_be_there(
    encoder, gallery, tracks, caplog, tmp_path
):
    whole = {"detector": lambda frame: [(0, 0, frame.shape[1], frame.shape[0], 0.9)]}
    index_images(encoder, gallery, sorted(tracks.rglob("t0/*.png")), **whole)
    moved = shutil.copytree(tracks, tmp_path / "moved")
    assert warnings_of(caplog, encoder, gallery, moved, **whole) == []
    moved = moved.rename(tmp_path / "again")
    (text,) = warnings_of(caplog, encoder, gallery, moved, **whole)
    assert "6 of 6 of these pictures" in text
    assert all(item.key.endswith("#person=1") for item in gallery.items())


def test_names_that_all_folders_have_cost_little(gallery, monkeypatch):
    """Each item is compared with the file whose folders are most like its own, and no other."""
    names = [f"t{folder}/{number:03d}.jpg" for folder in range(80) for number in range(25)]
    items = [Item(key=f"/nas/pictures/{name}", source=f"/nas/pictures/{name}") for name in names]
    rows = np.zeros((len(items), gallery.embed_dim), np.float32)
    rows[:, 0] = 1
    gallery.add(items, rows)
    compared = []
    monkeypatch.setattr(indexer, "_apart", lambda *paths: compared.append(paths) or _apart(*paths))
    files = [f"/srv/archive/{name}" for name in names]
    found = find_elsewhere(gallery, files, lambda path: [path], lambda item, file: True)
    assert found == Elsewhere(before="/nas/pictures", now="/srv/archive", found=100, examined=100)
    assert 0 < len(compared) <= 1000
    assert all(source.parts[-2:] == file.parts[-2:] for source, file in compared)

"""Nothing is written or removed through a symbolic link below the folder of a gallery."""

import os
import shutil

import numpy as np
import pytest

from tests.helpers.gallery_places import START, add_filmed, open_new, put, save
from tests.helpers.refused import refused
from upperson_camera.crop_folder import CropFolder, remove_unfinished
from upperson_console.user_state import UserState
from upperson_maintenance.erase_proof import Selection, prove_erasure
from upperson_maintenance.retention import Retention
from upperson_rt.errors import InputError
from upperson_rt.files import link_below, require_no_links
from upperson_rt.gallery import Gallery, Item
from upperson_rt.gallery.clips import clips_dir
from upperson_rt.gallery.snapshots import SNAPSHOTS, Snapshot, remove_snapshot, write_snapshot
from upperson_rt.ingest.service import Crop

NAMES = (
    "bin",
    "cameras",
    "clips",
    "crops",
    "erasures.log",
    "gallery.sqlite",
    "gallery.sqlite-mark",
)
NO_IMAGE = np.zeros((1, 1, 3), np.uint8)
SNAPSHOT = Snapshot(camera="gate", time=START, width=8, height=8)


def write_crop(gallery):
    folder = CropFolder(gallery.crops_dir, "run")
    item = Item(key="n", crop="gate/new.jpg", camera="gate", time=1.0)
    try:
        with folder.saved([Crop(item=item, pixels=NO_IMAGE, jpeg=b"new")]):
            pass
    finally:
        folder.close()


CHANGES = {
    "add": lambda gallery: put(gallery, ["new"]),
    "replace": lambda gallery: put(gallery, ["gate/anna/100"]),
    "delete": lambda gallery: gallery.delete(["gate/anna/100"]),
    "delete from the bin": lambda gallery: gallery.delete(["gate/binned/300"]),
    "prune": lambda gallery: gallery.prune(older_than=START + 200),
    "prune what no row names": lambda gallery: gallery.prune(older_than=10.0),
    "retention": lambda gallery: Retention(keep_s=1e6).enforce(gallery),
    "to the bin": lambda gallery: gallery.bin.add(["gate/anna/100"], "ada", "why"),
    "from the bin": lambda gallery: gallery.bin.restore([gallery.bin.entries()[0].id]),
    "tidy": lambda gallery: gallery.bin.tidy(),
    "proof": lambda gallery: prove_erasure(gallery, Selection()),
    "unfinished": lambda gallery: remove_unfinished(gallery, gallery.crops_dir),
}


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if not path.name.endswith(("-shm", "-wal"))
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A gallery with old files of no row, something in its bin, and a snapshot."""
    folder = tmp_path_factory.mktemp("made") / "gallery"
    with open_new(folder) as gallery:
        add_filmed(gallery, "gate/anna/100", "gate/ben/200", "gate/binned/300", "gate/gone/400")
        gallery.delete(["gate/gone/400"])
        gallery.bin.add(["gate/binned/300"], "ada", "why")
        for place in (gallery.crops_dir, clips_dir(gallery.crops_dir)):
            save(place, "gate/day/stray.1000.jpg")
            os.utime(place / "gate/day/stray.1000.jpg", (1, 1))
        write_snapshot(folder / SNAPSHOTS, SNAPSHOT, b"jpeg")
        shutil.copyfile(folder / "gallery.sqlite-mark", folder.parent / "mark")
    shutil.copyfile(folder.parent / "mark", folder / "gallery.sqlite-mark")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_gallery_with_a_link_in_its_folder_is_only_read(made, tmp_path, name):
    folder, elsewhere = shutil.copytree(made, tmp_path / "gallery"), tmp_path / "elsewhere"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    before = contents(tmp_path)
    for what, change in CHANGES.items():
        with Gallery.open(folder) as gallery:
            with refused("link_in_folder", InputError, path=str(folder / name)):
                change(gallery)
            assert gallery.count() == 2
        assert contents(tmp_path) == before, what
    if name == SNAPSHOTS:
        for use in (
            lambda: write_snapshot(folder / name, SNAPSHOT, b"new"),
            lambda: remove_snapshot(folder / name, "gate"),
        ):
            with refused("link_in_folder", InputError):
                use()
        assert contents(tmp_path) == before


def test_the_folder_of_a_gallery_itself_may_be_a_link(made, tmp_path):
    folder, link = shutil.copytree(made, tmp_path / "gallery"), tmp_path / "link"
    link.symlink_to(folder)
    with Gallery.open(link) as gallery:
        for what, change in CHANGES.items():
            if what != "delete":
                change(gallery)
        write_crop(gallery)
    assert "gate/day/stray.1000.jpg" not in contents(folder / "crops")


@pytest.mark.parametrize("target", ["hall", "../elsewhere"])
def test_nothing_goes_through_a_link_among_the_crops(made, tmp_path, target):
    """Also none that leads to another place of the same gallery."""
    folder = shutil.copytree(made, tmp_path / "gallery")
    elsewhere = folder / target
    for kind in ("crops", "clips", "bin/crops", "bin/clips"):
        place = folder / kind / "gate"
        place.rename(elsewhere.with_name(elsewhere.name + kind.replace("/", "-")))
        place.symlink_to(elsewhere.with_name(elsewhere.name + kind.replace("/", "-")))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.jpg")}
    with Gallery.open(folder) as gallery:
        for what in ("prune what no row names", "tidy", "to the bin", "from the bin", "prune"):
            CHANGES[what](gallery)
        gallery.delete(["gate/ben/200", "gate/binned/300"])
        with refused("link_in_folder", InputError, path=str(folder / "crops/gate")):
            write_crop(gallery)
        remove_unfinished(gallery, folder / "crops")
    now = {path: path.read_bytes() for path in before if path.exists()}
    assert now == {path: content for path, content in before.items() if SNAPSHOTS not in path.parts}


def test_the_state_of_a_console_is_behind_no_link(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state/console.sqlite").symlink_to(tmp_path / "victim")
    with refused("link_in_folder", InputError):
        UserState(tmp_path / "state/console.sqlite")
    assert not (tmp_path / "victim").exists()


def test_the_first_link_is_named(tmp_path):
    folder = tmp_path / "real"
    (folder / "a/b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    (folder / "a/b/c").symlink_to("nowhere")
    for root in (folder, tmp_path / "link"):
        assert link_below(root, root) is None
        assert link_below(root, root / "a/b/missing/file") is None
        assert link_below(root, root / "a/b/c/d") == root / "a/b/c"
        assert link_below(root, tmp_path / "other") == tmp_path / "other"
        require_no_links(root)
        with refused("link_in_folder", InputError, path=str(root / "a/b/c"), folder=str(root)):
            require_no_links(root, "a", "a/b/c/d")
    require_no_links(tmp_path / "missing")

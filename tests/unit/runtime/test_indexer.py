"""Pictures from files into a gallery, which may hold them under another folder's name."""

import logging
import os
import shutil
import threading
from types import SimpleNamespace

import pytest

from tests.helpers.refused import refused
from upperson_rt.encoder import Encoder
from upperson_rt.errors import BackendError, InputError, UsageError
from upperson_rt.ingest.files import index_images


def test_indexing_goes_past_bad_pictures(encoder, gallery, pictures, tmp_path):
    bad, gone, seen = tmp_path / "bad.png", tmp_path / "gone.png", []
    bad.write_bytes(b"junk")
    options = {"batch_size": 1, "progress": lambda *step: seen.append(step)}
    report = index_images(encoder, gallery, [bad, *pictures, gone], **options)
    assert report.indexed == gallery.count() == len(pictures)
    assert [skipped.path for skipped in report.skipped] == [str(bad), str(gone)]
    assert "cannot read image" in report.skipped[0].reason
    assert seen[-1] == (len(pictures) + 2, len(pictures) + 2)
    again = index_images(encoder, gallery, pictures)
    assert again.indexed == gallery.count() == len(pictures)
    for options, error in (({"batch_size": 0}, InputError), ({"workers": 0}, UsageError)):
        with refused("out_of_range", error, what=next(iter(options))):
            index_images(encoder, gallery, pictures, **options)
    with refused("wrong_object", UsageError, what="a gallery"):
        index_images(encoder, SimpleNamespace(add=print, delete=print), pictures)


@pytest.mark.parametrize("error", [KeyboardInterrupt, BackendError("the GPU is gone")])
def test_an_interruption_keeps_committed_batches_and_no_thread(encoder, gallery, pictures, error):
    before = threading.active_count()

    def interrupt(done, total):
        if done == 4:
            raise error

    with pytest.raises((KeyboardInterrupt, BackendError)) as raised:
        index_images(encoder, gallery, pictures, batch_size=2, progress=interrupt)
    assert raised.value.__traceback__ is not None
    assert threading.active_count() == before
    assert gallery.count() == 4
    assert gallery.verify() == []


def test_indexing_reads_times_tracks_and_attributes(encoder, gallery, pictures):
    os.utime(pictures[0], (1e9, 1e9))
    options = {"time_from": "mtime", "track_from": "folder", "attributes": {"floor": 2}}
    report = index_images(encoder, gallery, pictures[:1], workers=1, **options)
    assert (report.indexed, report.timed) == (1, 1)
    (item,) = gallery.items()
    assert (item.time, item.track, item.attributes) == (1e9, pictures[0].parent.name, {"floor": 2})


def test_indexing_decodes_one_batch_ahead_and_no_further(encoder, gallery, pictures):
    prepared, seen = [], []
    spied = Encoder(encoder.manifest, encoder.variant, encoder.tokenizer, encoder.backend)
    spied.prepare_image = lambda image: prepared.append(image) or encoder.prepare_image(image)

    def progress(done, total):
        seen.append((done, len(prepared)))

    index_images(spied, gallery, pictures, batch_size=1, progress=progress, workers=4)
    assert [done for done, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert all(count <= done + 1 for done, count in seen)
    assert len(prepared) == len(pictures)
    assert {item.key for item in gallery.items()} == set(map(str, pictures))


# --- Pictures that a gallery holds already, under the name of another folder


@pytest.fixture
def tracks(tmp_path, pictures):
    """A folder with numbered pictures of three tracks, as one machine has it."""
    for number, picture in enumerate(pictures):
        place = tmp_path / "nas" / "pictures" / f"t{number % 3}" / f"{number // 3:03d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, place)
    return tmp_path / "nas" / "pictures"


@pytest.fixture
def warnings_of(caplog, encoder, gallery):
    def index(folder, **options):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "upperson_rt.ingest.files"):
            index_images(encoder, gallery, sorted(folder.rglob("*.png")), **options)
        return caplog.messages

    return index


def test_another_mount_point_is_noticed(warnings_of, tracks, tmp_path):
    assert warnings_of(tracks) == []
    assert warnings_of(tracks) == [], "the same again"
    moved = tmp_path / "srv" / "archive"
    moved.parent.mkdir()
    tracks.rename(moved)
    (text,) = warnings_of(moved)
    assert f"6 of 6 of these pictures by the same names in {tracks}" in text
    assert f" {moved}:" in text
    assert warnings_of(moved) == [], "now it has both"
    (tmp_path / "link").symlink_to(moved)
    (text,) = warnings_of(tmp_path / "link")
    assert f" {tmp_path / 'link'}:" in text


@pytest.mark.parametrize("same", ["names", "camera", "time"])
def test_other_pictures_of_the_same_names_are_none(same, warnings_of, gallery, tracks, tmp_path):
    options = {"camera": "gate", "time_from": "mtime"}
    assert warnings_of(tracks, **options) == []
    others = shutil.copytree(tracks, tmp_path / "hall" / "pictures")
    if same != "names":  # As on another machine, where the first ones are not to be seen.
        shutil.rmtree(tracks)
    if same == "camera":
        options["camera"] = "hall"
    if same == "time":
        for picture in others.rglob("*.png"):
            os.utime(picture, (1e9, 1e9))
    assert warnings_of(others, **options) == []
    assert gallery.count() == 12

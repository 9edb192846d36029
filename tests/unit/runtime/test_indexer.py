"""Pictures from files into a gallery."""

import os
import threading
from types import SimpleNamespace

import pytest

from tests.helpers.refused import refused
from upperson_rt.encoder import Encoder
from upperson_rt.errors import BackendError, InputError, UsageError
from upperson_rt.ingest.files import index_images


def test_indexing_goes_past_bad_pictures(encoder, gallery, pictures, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"junk")
    seen = []
    report = index_images(
        encoder,
        gallery,
        [bad, *pictures, tmp_path / "gone.png"],
        batch_size=1,
        progress=lambda *step: seen.append(step),
    )
    assert report.indexed == gallery.count() == len(pictures)
    assert [skipped.path for skipped in report.skipped] == [str(bad), str(tmp_path / "gone.png")]
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

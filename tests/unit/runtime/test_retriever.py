import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.toy_bundle import COLOURS, draw_person, make_toy_bundle
from upperson_rt.bundle import open_encoder
from upperson_rt.encoder import Encoder
from upperson_rt.errors import BackendError, InputError, UsageError
from upperson_rt.gallery import Filter, Gallery, Hit, Item
from upperson_rt.indexer import index_images
from upperson_rt.retriever import Retriever
from upperson_rt.sheet import draw_sheet, save_sheet

COLOURS_IN_ORDER = list(COLOURS)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return open_encoder(make_toy_bundle(tmp_path_factory.mktemp("r") / "bundle"), threads=1)


@pytest.fixture
def pictures(tmp_path):
    return [draw_person(tmp_path / f"{colour}.png", colour) for colour in COLOURS]


@pytest.fixture
def gallery(tmp_path, encoder):
    path = tmp_path / "gallery"
    with Gallery.open(path, encoder.fingerprint, encoder.embed_dim, create=True) as store:
        yield store


def test_sentences_find_pictures(encoder, gallery, pictures):
    report = index_images(encoder, gallery, pictures, camera="gate", batch_size=4)
    assert (report.indexed, report.skipped) == (len(pictures), [])
    retriever = Retriever(encoder, gallery)
    best = retriever.query("a woman in a red coat", k=2)
    assert best[0].item.source == str(tmp := pictures[0].absolute()), tmp
    assert best[0].item.camera == "gate"
    assert best[0].score > best[1].score
    red, blue = retriever.query(["red", "blue"], k=1)
    assert [red[0].item.source, blue[0].item.source] == [str(pictures[0]), str(pictures[2])]
    assert retriever.query("red", where=Filter(camera="hall")) == []
    assert retriever.query([]) == []
    with pytest.raises(InputError, match="is empty"):
        retriever.query(" ")


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
    with pytest.raises(InputError, match="batch_size"):
        index_images(encoder, gallery, pictures, batch_size=0)


def test_interrupted_indexing_keeps_committed_batches(encoder, gallery, pictures):
    def interrupt(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_images(encoder, gallery, pictures, batch_size=2, progress=interrupt)
    assert gallery.count() == 4
    assert gallery.verify() == []


def test_sentences_and_pictures_in_one_call(encoder, gallery, pictures):
    index_images(encoder, gallery, pictures)
    retriever = Retriever(encoder, gallery)
    with Image.open(pictures[2]) as image:
        blue = image.convert("RGB")
    bgr = np.asarray(blue)[..., ::-1]
    mixed = ["green", pictures[0], blue, bgr, "a man in yellow"]
    found = retriever.query(mixed, k=1, channels="bgr")
    best = [COLOURS_IN_ORDER.index(Path(hits[0].item.source).stem) for hits in found]
    assert best == [1, 0, 2, 2, 3]
    for query, hits in zip(mixed, found, strict=True):
        (single,) = retriever.query(query, k=1, channels="bgr")
        assert (single.id, single.score) == (hits[0].id, pytest.approx(hits[0].score, abs=1e-6))
    # A str is a sentence, whatever file has that name.
    assert retriever.query(str(pictures[0]), k=1)[0].score < 0.9
    assert retriever.query(pictures[0], k=1)[0].score > 0.99
    with pytest.raises(InputError, match=r"missing\.png: No such file"):
        retriever.query(Path("missing.png"))
    with pytest.raises(UsageError, match="k must be at least 1"):
        retriever.query("red", k=0)
    with pytest.raises(InputError, match=r"expected a picture: .* found int"):
        retriever.query([5])


def test_sentences_do_not_load_the_image_tower(encoder, gallery):
    loaded = []
    spied = Encoder(
        encoder.manifest,
        encoder.variant,
        encoder.tokenizer,
        lambda tower: loaded.append(tower) or encoder.backend(tower),
    )
    Retriever(spied, gallery).query(["red", "blue"])
    assert loaded == ["text"]


def test_by_track(encoder, gallery, pictures):
    items = [
        Item(key=f"{i}", camera="gate", track="a" if i < 4 else None, time=float(i))
        for i in range(len(pictures))
    ]
    gallery.add(items, encoder.encode_images(pictures))
    hits = Retriever(encoder, gallery).query("red", by_track=True)
    assert [hit.item.key for hit in hits if hit.span] == ["0"]
    assert (hits[0].span.first_time, hits[0].span.last_time, hits[0].span.pictures) == (0, 3, 4)
    assert len(hits) == 3


def test_threads_may_share_a_retriever(encoder, gallery, pictures):
    index_images(encoder, gallery, pictures)
    retriever = Retriever(encoder, gallery)
    queries = [*COLOURS, *pictures] * 4
    expected = [retriever.query(query, k=3) for query in queries]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda query: retriever.query(query, k=3), queries)) == expected


def test_indexing_reads_times_tracks_and_attributes(encoder, gallery, pictures):
    os.utime(pictures[0], (1e9, 1e9))
    report = index_images(
        encoder,
        gallery,
        pictures[:1],
        time_from="mtime",
        track_from="folder",
        attributes={"floor": 2},
        workers=1,
    )
    assert (report.indexed, report.timed) == (1, 1)
    (item,) = gallery.items()
    assert (item.time, item.track, item.attributes) == (1e9, pictures[0].parent.name, {"floor": 2})
    with pytest.raises(UsageError, match="workers must be at least 1"):
        index_images(encoder, gallery, pictures, workers=0)


def test_indexing_decodes_one_batch_ahead_and_no_further(encoder, gallery, pictures):
    prepared, seen = [], []
    spied = Encoder(encoder.manifest, encoder.variant, encoder.tokenizer, encoder.backend)
    spied.prepare_image = lambda path: prepared.append(path) or encoder.prepare_image(path)

    def progress(done, total):
        seen.append((done, len(prepared)))

    index_images(spied, gallery, pictures, batch_size=1, progress=progress, workers=4)
    assert [done for done, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert all(count <= done + 1 for done, count in seen)
    assert sorted(prepared) == sorted(map(str, pictures))


def test_a_failed_run_leaves_no_thread_behind(encoder, gallery, pictures):
    before = threading.active_count()

    def fail(done, total):
        raise BackendError("the GPU is gone")

    with pytest.raises(BackendError) as raised:
        index_images(encoder, gallery, pictures, batch_size=2, progress=fail)
    assert raised.value.__traceback__ is not None
    assert threading.active_count() == before
    assert gallery.count() == 2


def hit(id, source, **fields):
    return Hit(id=id, score=0.5, item=Item(key=f"k{id}", source=source, **fields))


def test_sheet_shows_pictures_and_missing_ones(tmp_path):
    red = tmp_path / "red.png"
    Image.new("RGB", (60, 180), (255, 0, 0)).save(red)
    broken = tmp_path / "broken.png"
    broken.write_bytes(red.read_bytes()[:60])
    hits = [
        hit(1, str(red), camera="gate", time=1764000000.0),
        hit(2, str(tmp_path / "gone.png")),
        hit(3, str(broken)),
        hit(4, str(red), box=(0, 0, 30, 30)),
        hit(5, str(red), box=(100, 0, 130, 30)),
        hit(6, None, time=1e300),
    ]
    path = tmp_path / "out" / "sheet.png"
    save_sheet(path, "a woman in red\n" * 40, hits, columns=3)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    is_red = (pixels[..., 0] > 240) & (pixels[..., 1] < 15) & (pixels[..., 2] < 15)
    # Two of the six tiles are red: one of 1:3, one square cut to its box.
    assert is_red.sum() == pytest.approx(147 * 440 + 220 * 220, rel=0.05)
    assert [entry.name for entry in path.parent.iterdir()] == ["sheet.png"]


def test_sheet_prefers_the_saved_picture(tmp_path):
    Image.new("RGB", (60, 120), (255, 0, 0)).save(tmp_path / "frame.png")
    (tmp_path / "crops").mkdir()
    Image.new("RGB", (30, 60), (0, 0, 255)).save(tmp_path / "crops" / "1.png")
    frame = str(tmp_path / "frame.png")
    saved = hit(1, frame, box=(0, 0, 30, 30), crop="1.png")
    lost = hit(2, frame, box=(0, 0, 60, 120), crop="gone.png")

    def share(colour, *hits):
        pixels = np.asarray(draw_sheet("red", hits, crops_dir=tmp_path / "crops"))
        return (pixels == colour).all(axis=-1).sum()

    assert share((0, 0, 255), saved) == pytest.approx(220 * 440, rel=0.02)
    assert share((255, 0, 0), saved) == 0
    assert share((255, 0, 0), lost) == pytest.approx(220 * 440, rel=0.02)


def test_sheet_sizes():
    none, one, six = (draw_sheet("red", [hit(i, None) for i in range(n)]) for n in (0, 1, 6))
    assert none.height < one.height < six.height
    assert none.width == one.width < six.width
    assert draw_sheet("x" * 500, []).width == none.width


def test_a_sheet_shows_five_hundred_pictures_at_most():
    most, more = (
        draw_sheet("red", [hit(i, None) for i in range(n)], columns=50) for n in (500, 5000)
    )
    assert most.size == more.size
    told = np.asarray(most.crop((0, 0, most.width, 200))) != more.crop((0, 0, most.width, 200))
    assert told.any(), "it says how many there are"


def test_sheet_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        save_sheet(tmp_path / "file" / "sheet.png", "red", [])

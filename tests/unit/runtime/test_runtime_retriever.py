import numpy as np
import pytest
from PIL import Image

from tests.helpers.toy_bundle import COLOURS, draw_person, make_toy_bundle
from upperson_rt.bundle import open_encoder
from upperson_rt.errors import InputError
from upperson_rt.gallery import Filter, Gallery, Hit, Item
from upperson_rt.indexer import index_images
from upperson_rt.retriever import Retriever
from upperson_rt.sheet import draw_sheet, save_sheet


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


def test_sheet_sizes():
    none, one, six = (draw_sheet("red", [hit(i, None) for i in range(n)]) for n in (0, 1, 6))
    assert none.height < one.height < six.height
    assert none.width == one.width < six.width
    assert draw_sheet("x" * 500, []).width == none.width


def test_sheet_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        save_sheet(tmp_path / "file" / "sheet.png", "red", [])

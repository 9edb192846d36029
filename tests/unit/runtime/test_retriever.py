from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.refused import refused
from tests.helpers.toy_bundle import COLOURS
from upperson_rt.encoder import Encoder
from upperson_rt.errors import InputError, UsageError
from upperson_rt.gallery import Filter, Item
from upperson_rt.ingest.files import index_images
from upperson_rt.retriever import Retriever
from upperson_rt.search.query import SearchRequest

COLOURS_IN_ORDER = list(COLOURS)


def test_sentences_find_pictures(encoder, gallery, pictures):
    report = index_images(encoder, gallery, pictures, camera="gate", batch_size=4)
    assert (report.indexed, report.skipped) == (len(pictures), [])
    retriever = Retriever(encoder, gallery)
    best = retriever.query("a woman in a red coat", k=2)
    assert (best[0].item.source, best[0].item.camera) == (str(pictures[0].absolute()), "gate")
    assert best[0].score > best[1].score
    red, blue = retriever.query(["red", "blue"], k=1)
    assert [red[0].item.source, blue[0].item.source] == [str(pictures[0]), str(pictures[2])]
    assert retriever.query("red", where=Filter(camera="hall")) == []
    requests = [
        SearchRequest(sentence="red", where=where) for where in (None, Filter(camera="hall"))
    ]
    everywhere, nowhere = retriever.service.search_all(requests)
    assert (len(everywhere.hits), nowhere.hits) == (len(pictures), [])
    where = Filter(camera="hall")
    noted = retriever.service.search(
        SearchRequest(sentence="red, no bag", where=where, notices=True)
    )
    assert [notice.is_warning for notice in noted.notices] == [True, False, False]
    assert retriever.query([]) == []
    with refused("sentence_empty", InputError):
        retriever.query(" ")


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
    with refused("image_unreadable", InputError, path="missing.png"):
        retriever.query(Path("missing.png"))
    with refused("out_of_range", UsageError, what="k"):
        retriever.query("red", k=0)
    with refused("no_picture", InputError):
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

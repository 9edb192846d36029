"""Addresses of Milvus galleries, what is stored of an item, and exact order, without a server."""

import re

import numpy as np
import pytest

from tests.helpers.gallery_places import DIM, some_vectors
from tests.helpers.refused import refused
from upperson_milvus import rows, store
from upperson_milvus.collection import Known, RecentWrites
from upperson_milvus.connection import TOKEN_VARIABLE, parse
from upperson_rt.errors import UsageError
from upperson_rt.gallery import Gallery, Hit, Item


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("location", "uri", "collection", "database", "text"),
    [
        ("host/people", "http://host:19530", "people", "", "host:19530/people"),
        ("[::1]:7/shop/people?tls=true&index=hnsw&timeout=2.5", "https://[::1]:7", "people", "shop",
         None),
        ("/data/a%20b/people.db/front?index=ivf_sq8", "/data/a b/people.db", "front", "", None),
    ],
)  # fmt: skip
def test_locations(location, uri, collection, database, text):
    place = parse(f"milvus://{location}")
    found = (place.uri, place.collection, place.database, place.text, place.token)
    assert found == (uri, collection, database, f"milvus://{text or location}", "")
    assert str(place.file) == (uri if uri.endswith(".db") else "None")
    assert parse(place.text) == place
    if "hnsw" in location:
        assert (place.options.index, place.options.timeout_s) == ("hnsw", 2.5)


def test_passwords_are_taken_and_never_shown(monkeypatch):
    place = parse("milvus://ann:s3%3Acret@host/people")
    assert place.token == "ann:s3:cret"
    assert place.text == "milvus://ann@host:19530/people"
    assert "cret" not in repr(place)
    with refused("password_missing", UsageError, user="ann"):
        parse(place.text)
    monkeypatch.setenv(TOKEN_VARIABLE, "ann:other")
    assert parse(place.text).token == parse("milvus://host/people").token == "ann:other"
    with refused("password_missing", UsageError, user="bob"):
        parse("milvus://bob@host/people")


def test_malformed_locations_are_refused_without_their_password():
    for place in (
        "host", "host/", "host/a-b", "host/1a", "host/a/b/c", "host:port/a", "host:99999/a",
        "/people.db", "/data/people/front", "ann:12/s3cret@host/a", "ann:1?s3cret@host/a",
        "ann:#s3cret@host/a",
    ):  # fmt: skip
        with refused("location_malformed", UsageError) as raised:
            Gallery.open(f"milvus://{place}")
        assert "s3cret" not in str(raised.value)
    for query in (
        "colour=red", "index=tree", "consistency=eventually", "tls=yes", "timeout=soon",
        "timeout=0", "timeout=nan",
    ):  # fmt: skip
        with refused("option_invalid", UsageError, option=query.partition("=")[0]):
            Gallery.open(f"milvus://host/a?{query}")


# Rows


def test_ids_and_hashes_stay_what_they_are():
    """They are stored: another value here would orphan every collection there is."""
    assert rows.id_of("/crops/000001.jpg") == 7121284735137225458
    assert rows.hashes_of({"n": 1, "c": "röd", "on": True, "x": 0.5}) == [
        "5a645e5c04933eb3a4f639e0b6b66818",
        "e4bc34212defbb240c42d54ac46de7c1",
        "f05505814787bee455519e64a192f803",
        "b838b7388f6811fdbd3d5b706212e679",
    ]
    different = [1, True, "1", "true", "True", 0, False, "", 0.1, 2**53, 2**53 + 1, '["number"]']
    assert len({*rows.hashes_of(dict(enumerate(different)))}) == len(different)
    assert rows.hashes_of({"a": 0}) == rows.hashes_of({"a": -0.0})


def test_texts_and_float16_vectors_come_back():
    for text in (None, "", "\x01", "\x01\x01", "a\x01", "\x01a", " ", "a"):
        stored = rows.encode_text(text, "text")
        assert rows.decode_text(stored) == text
        assert (stored == "") == (text is None)
    vectors = some_vectors(3)
    sent = rows.encode_vectors(vectors, "float16")
    assert [row.dtype for row in sent] == [np.float16] * 3
    for received in ([row.tobytes() for row in sent], [[row.tobytes()] for row in sent]):
        back = rows.decode_vectors(received, "float16", DIM)
        assert back.dtype == np.float32
        np.testing.assert_array_equal(back, vectors.astype(np.float16))


def test_recent_writes_correct_what_was_read():
    recent = RecentWrites()
    recent.record({1: Known("a", "gate", 5), 2: Known("b", "", 6)})
    recent.record({2: None})
    read = {2: Known("b", "stale", 6), 3: Known("c", "old", 7)}
    recent.update(read, [1, 2, 3])
    assert read == {1: Known("a", "gate", 5), 3: Known("c", "old", 7)}
    forgetful, read = RecentWrites(seconds=-1), {}
    forgetful.record({1: Known("a", "gate", 5)})
    forgetful.update(read, [1])
    assert read == {}


# Exact order on a server that picks the worst of several rows with equal scores

QUERY = np.ones((1, 1), np.float32)


class Contrary:
    """A collection whose search leaves out the lowest ids among rows with equal scores."""

    def __init__(self, count, scores, tracks):
        rng = np.random.default_rng(count)
        drawn = [(float(rng.integers(scores)), rng.integers(tracks)) for _ in range(count)]
        self.hits = [
            Hit(id=1000 + n, score=score, item=Item(key=str(n), track=f"track-{track}."))
            for n, (score, track) in enumerate(drawn)
        ]
        self.ranked = sorted(self.hits, key=lambda hit: (-hit.score, hit.id))

    def search(self, queries, limit, condition):
        gone = {int(id_) for id_ in re.findall(r"\d+", condition)}
        left = [hit for hit in self.hits if hit.id not in gone and hit.item.track not in condition]
        best = sorted(left, key=lambda hit: (-hit.score, -hit.id))[:limit]
        return [sorted(best, key=lambda hit: (-hit.score, hit.id))] * len(queries)


@pytest.fixture
def few(monkeypatch):
    """The most that one request may return."""
    monkeypatch.setattr(store, "MOST_HITS", 64)


def test_ties_are_ordered_by_id(few):
    for scores in (1, 3, 40):
        found = Contrary(60, scores, 5)
        for k in (1, 2, 10, 31):
            assert store.best_rows(found, QUERY, k, "") == [found.ranked[:k]]


@pytest.mark.parametrize(("scores", "tracks"), [(10, 1), (40, 4), (10, 50), (40, 50)])
def test_the_best_of_each_track(few, scores, tracks):
    """More pictures than one request returns, but not more with one score."""
    found = Contrary(200, scores, tracks)
    best = {}
    for hit in found.ranked:
        best.setdefault(hit.item.track, hit)
    for k in (1, 3, 20, 35, 50):
        assert store.best_of_each_track(found, QUERY, k, "") == [*best.values()][:k]

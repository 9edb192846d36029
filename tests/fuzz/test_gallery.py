"""A gallery takes what it can keep, refuses the rest, and answers the next query as before."""

import dataclasses
import json
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import example
from hypothesis import strategies as st

from tests.helpers.fuzzing import (
    Odd,
    Text,
    as_json,
    damaged_json,
    examples,
    fuzz,
    mostly,
    nested,
    refused_well,
    texts,
    values,
)
from tests.helpers.gallery_places import some_vectors
from upperson_log.query_log import QueryLog
from upperson_maintenance.export import export_gallery
from upperson_rt.errors import UppersonError
from upperson_rt.gallery import Filter, Gallery, Item
from upperson_shards.indexing import require_same_rows
from upperson_shards.records import ShardRecord, Tally, _checksum, check_whole

DIM = 8
VECTORS = some_vectors(6, dim=DIM)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    place = tmp_path_factory.mktemp("fuzz") / "gallery"
    with Gallery.open(place, "f" * 64, DIM, create=True) as opened:
        items = [
            Item(key=f"k{n}", camera="gate", time=1e9 + n, track=f"t{n % 2}", attributes={"n": n})
            for n in range(6)
        ]
        opened.add(items, VECTORS)
        yield opened


def still_answers(gallery):
    for by_track in (False, True):
        (hits,) = gallery.search(VECTORS[:1], 10, by_track=by_track)
        assert hits[0].item.key == "k0"
    assert {item.key for item in gallery.items()} >= {f"k{n}" for n in range(6)}


item_fields = st.fixed_dictionaries(
    {"key": mostly("new", "other")},
    optional={
        "source": mostly("a.jpg"),
        "camera": mostly("gate"),
        "time": mostly(1e9, 5, np.float32(7)),
        "track": mostly("t"),
        "box": mostly((0, 0, 9, 9), [1.0, 2.0, 3.0, 4.0]),
        "crop": mostly("gate/1.jpg"),
        "attributes": mostly({"a": 1}, {"deep": nested(20)}),
    },
)


@fuzz(fields=item_fields, variant=mostly("int8", None))
@examples(
    {"fields": {"key": "a"}, "variant": "\udcff"},
    {"fields": {"key": Text.GATE, "source": np.str_("a")}, "variant": Text.GATE},
    *({"fields": {"key": "a"} | odd, "variant": None} for odd in (
        {"time": 10**400}, {"box": 5}, {"box": (0, 0, 10**400, 10**400)},
        {"box": (0, 0, np.nan, 9)},
        {"attributes": {"a": nested(3000)}}, {"attributes": np.array([1, 2])},
        {"attributes": {"a": 10**5000}},
    )),
)  # fmt: skip
def test_items(gallery, fields, variant):
    item = refused_well(Item, **fields)
    if isinstance(item, Item):
        done = refused_well(gallery.add, [item], VECTORS[5:], variant)
        still_answers(gallery)
        if not isinstance(done, UppersonError):  # Then it comes back, and goes again.
            (found,) = (one for one in gallery.items() if one.key == item.key)
            assert (found.camera, found.track, found.box) == (item.camera, item.track, item.box)
            assert gallery.delete([item.key]) == 1
        assert gallery.verify() == []


@fuzz(items=mostly([], [Item(key="new")], "new"), vectors=mostly(VECTORS[:1], VECTORS[:0]))
@example(items=[5], vectors=VECTORS[:1].astype(np.float64) * 1e300)
@example(items=[Item(key="new")], vectors=[[1, [2]]])
@example(items=[Item(key="new")], vectors=[[10**400] * DIM])
def test_what_is_added(gallery, items, vectors):
    refused_well(gallery.add, items, vectors)
    gallery.delete(["new"])
    still_answers(gallery)


filter_fields = st.fixed_dictionaries(
    {},
    optional={
        "camera": mostly("gate", ["gate", "hall"], None),
        "since": mostly(1e9, 0, None),
        "until": mostly(2e9, None),
        "track": mostly("t0", None),
        "attributes": mostly({"n": 1}, {"a.b\"'": "x"}),
    },
)


@fuzz(fields=filter_fields, k=mostly(3), by_track=st.booleans(), vectors=mostly(VECTORS[:2]))
@examples(
    {"fields": {}, "k": 3, "by_track": False, "vectors": VECTORS[:1]},
    {"fields": {"camera": ["gate", 5]}}, {"fields": {"since": np.int64(5)}},
    {"fields": {"since": 10**400}}, {"fields": {"track": "\ud800"}, "by_track": True},
    {"fields": {"attributes": {"\udcff": 1}}}, {"fields": {"attributes": {"n": "\udcff"}}},
    {"fields": {"attributes": {5: 1}}}, {"fields": {"attributes": 5}}, {"k": 2.5}, {"k": 10**30},
    {"k": 2**31 - 1, "by_track": True}, {"vectors": 5}, {"vectors": VECTORS[:1] * 1e38},
)  # fmt: skip
def test_questions(gallery, fields, k, by_track, vectors):
    where = refused_well(Filter, **fields)
    if isinstance(where, UppersonError):
        return
    found = refused_well(gallery.search, vectors, k, where, by_track)
    if isinstance(found, list):
        for hits in found:
            assert all(np.isfinite(hit.score) and abs(hit.score) < 1.01 for hit in hits)
            assert len(hits) <= k
    passing = list(gallery.items(where))
    assert gallery.count(where) == len(passing)
    assert sum(len(items) for items, _ in gallery.vectors(where)) == len(passing)


@fuzz(where=values, k=mostly(3))
@example(where=[], k=3)
@example(where=Filter, k=3)
@example(where=np.array(["gate"]), k=3)
def test_what_is_no_filter(gallery, where, k):
    """None is: everything passes it."""
    for ask in (
        lambda: gallery.search(VECTORS[:1], k, where),
        lambda: gallery.search(VECTORS[:0], k, where),
        lambda: gallery.count(where),
        lambda: gallery.items(where),
        lambda: gallery.vectors(where),
        lambda: gallery.delete_where(where),
    ):
        assert isinstance(refused_well(ask), UppersonError) or where is None
    still_answers(gallery)


@fuzz(
    keys=mostly(["none"], ["none", "else"]), older_than=mostly(5, None), keep=mostly(100, None),
    camera=mostly("nowhere"), batch_size=mostly(3),
)  # fmt: skip
@examples(
    {"keys": [], "older_than": None, "keep": None, "camera": None, "batch_size": 1},
    {"keys": ["\udcff"]}, {"keys": "k0"}, {"keys": [5], "older_than": "x"},
    {"older_than": 10**400, "batch_size": 0}, {"keep": 1.5},
)  # fmt: skip
def test_what_is_deleted(gallery, keys, older_than, keep, camera, batch_size):
    refused_well(gallery.ids, keys)
    refused_well(gallery.delete, keys)
    refused_well(gallery.count_prunable, older_than, keep, camera)
    if isinstance(camera, str) and camera not in ("", "gate"):
        refused_well(gallery.prune, older_than, keep, camera)
    refused_well(gallery.vectors, None, batch_size)
    still_answers(gallery)


@fuzz(
    location=st.one_of(texts, mostly("milvus://", "milvus://h:x/c", "postgres://a/b")),
    fingerprint=mostly("f" * 64, None), embed_dim=mostly(8, None), create=st.booleans(),
)  # fmt: skip
@examples(
    {"location": "g", "fingerprint": "f", "embed_dim": 8, "create": True},
    {"location": "a\0b"}, {"location": None}, {"location": b"gallery"},
    {"embed_dim": 10**30}, {"embed_dim": nested(100_000)}, {"fingerprint": "\udcff"},
    {"fingerprint": np.array(["f"]), "embed_dim": np.ones(3)}, {"fingerprint": 5, "embed_dim": 2.5},
    {"location": "x" * 10**6, "fingerprint": "f" * 10**6},
    {"location": "milvus://\udcff:1/c", "create": False},
)  # fmt: skip
def test_places(tmp_path_factory, monkeypatch, location, fingerprint, embed_dim, create):
    monkeypatch.chdir(tmp_path_factory.mktemp("places"))
    if isinstance(location, str) and (location.startswith(("/", "milvus")) or ".." in location):
        create = False
        if location.count("/") > 2 and ":19530" in location:
            return  # No request goes to a server that is there by chance.
    opened = refused_well(Gallery.open, location, fingerprint, embed_dim, create=create)
    if isinstance(opened, Gallery):
        opened.close()


@fuzz(
    path=mostly("exported", "a/b"), query=mostly("red", {"file": "x"}), k=mostly(3),
    user=mostly("ann"), hits=mostly([]), where=mostly(None, Filter(camera="gate")),
)  # fmt: skip
@examples(
    {"path": "log", "query": "red", "k": 3, "user": "ann", "hits": [], "where": None},
    {"path": "a\0b"}, {"query": "\udcff", "k": 10**5000}, {"query": {"a": nested(3000)}},
    {"query": Odd(), "k": Odd(), "user": 5}, {"hits": ["x"], "where": {"camera": "gate"}},
)  # fmt: skip
def test_exports_and_logs(
    gallery, tmp_path_factory, monkeypatch, path, query, k, user, hits, where
):
    monkeypatch.chdir(tmp_path_factory.mktemp("logs"))
    if isinstance(path, str) and ("/" in path or path.startswith(".")):
        path = "log"
    log = refused_well(QueryLog, path, user)
    if isinstance(log, QueryLog):
        with log:
            refused_well(log.write, query, hits, k=k, where=where)
        lines = log.path.read_bytes().decode("ascii").splitlines()
        assert len(lines) <= 1
        refused_well(export_gallery, gallery, log.path.with_suffix(".x"), where)
        if not callable(hits):  # What a caller's own function raises is the caller's.
            refused_well(export_gallery, gallery, log.path.with_suffix(".y"), None, hits)


RECORD, OTHER = (
    ShardRecord(
        shard=f"{number}/2",
        fingerprint="f" * 64,
        whole=Tally.of(["a", "b", "c"]),
        own=Tally.of(own),
        root="/pictures",
        made_with={"--camera": "gate"},
        finished=True,
        items=Tally.of(own[:1]),
        with_items=1,
        empty=len(own) - 1,
    )
    for number, own in ((1, ["a", "b"]), (2, ["c"]))
)
DOCUMENT = dataclasses.asdict(RECORD)
MANY = 10**4299


@fuzz(document=damaged_json(DOCUMENT))
@examples(
    *({"document": DOCUMENT | change} for change in (
        {"shard": "0/2"}, {"shard": "x" * 10**5}, {"root": "x" * 10**5},
        {"own": {"count": MANY, "total": "f" * 32}, "with_items": MANY},
        {"made_with": {"--camera": "x" * 10**5}},
    )),
)  # fmt: skip
def test_records_of_shards(written, document):
    """Their checksum is right: it is for accidents, and easy to make."""
    with suppress(ValueError, TypeError):
        content = json.loads(as_json(document))
        document = content | {"checksum": _checksum(content)}
    file = written("shard.json", document)
    found = refused_well(ShardRecord.read, file)
    if isinstance(found, ShardRecord):
        refused_well(check_whole, [file.parent, file], [found, OTHER])
        refused_well(require_same_rows, "here", found, RECORD)

"""What a gallery promises, in every store. Differences are in docs/how-to/milvus.md, not here."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.helpers.gallery_places import (
    DIM,
    FINGERPRINT,
    items_of,
    keys_of,
    put,
    some_vectors,
    unit,
)
from tests.helpers.refused import refused
from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.gallery import CameraInfo, Filter, Gallery, Item, TrackSpan

# Some take dozens of requests, and a Milvus server on a busy machine answers late.
pytestmark = pytest.mark.timeout(60)
ODD_TEXTS = [
    'quo"te', "apo'strophe", "back\\slash", "\\", '\\"', "new\nline", "\r", "tab\t", "\x01", "\x7f",
    "%", "_", "*", "{a}", "$.a", "a.b", "[0]", "~1", "/", "\\n", "\\u0041", "ü", "u\u0308", "人 😀",
    "\u2028", "\ufeff", " ", "", "null", "true", "1",
    '" or id >= 0 or camera == "', "' or 1=1 --", '"] or id >= 0 or camera in ["', '" OR 1=1', "-",
    "'; DROP TABLE items; --", "' || '", "a b", "$", "$.x", '"', "x[0]", "a\\", "?", ":x", "@x",
]  # fmt: skip
FULL = Item(
    key="/crops/ünï 人😀.jpg", source='rtsp://cam/1?a="b"\\c', camera="gate 'north'",
    time=1_700_000_000.123456, track="t-7", box=(-3, 0, 12345, 70000), crop="gate/000001.jpg",
    attributes={
        "colour": "röd", "sub": {"deep": [1, None, "x"], "quo\"te": True}, "score": 0.1,
        "large": 2**53 + 1, "negative": -(2**62), "whole": 3.0, "none": None, "on": True,
        "": "empty name",
    },
)  # fmt: skip
EMPTY_TEXTS = Item(key=" ", source="", camera="", track="", attributes={"a": ""})
BARE = Item(key="bare", time=-0.5)
BAD = np.full((1, DIM), np.nan, np.float32)


def rounded(found):
    """Leave out the last digits of scores, which depend on where a vector lies in memory."""
    return [[(round(hit.score, 5), hit.id, hit.item, hit.span) for hit in hits] for hits in found]


def test_items_come_back_as_they_were_added(gallery):
    added = [FULL, EMPTY_TEXTS, BARE]
    gallery.add(added, unit(0, 1, 2), variant="fp16")
    for item, (hit,) in zip(added, gallery.search(unit(0, 1, 2), k=1), strict=True):
        assert hit.item == item
        assert hit.score == pytest.approx(1, abs=1e-3)
        assert hit.span is None
        assert isinstance(hit.id, int)
    assert {item.key: item for item in gallery.items()} == {item.key: item for item in added}
    whole = gallery.search(unit(0), k=1)[0][0].item.attributes["whole"]
    assert isinstance(whole, float)


def test_an_empty_gallery_answers(gallery):
    gallery.add([], np.empty((0, DIM), np.float32))
    assert gallery.search(unit(0, 1), k=3) == [[], []]
    assert gallery.search(unit(0), k=3, by_track=True) == [[]]
    assert gallery.search(np.empty((0, DIM), np.float32), k=3) == []
    assert gallery.search_with_vectors(unit(0)[0], 3)[1].shape == (0, DIM)
    assert (gallery.count(), list(gallery.items()), list(gallery.vectors())) == (0, [], [])
    assert (gallery.vectors_of([]), gallery.get([]), gallery.sample(3)) == ({}, {}, [])
    assert gallery.delete(["nothing"]) == gallery.delete([]) == gallery.prune(keep_newest=1) == 0
    assert (gallery.cameras(), gallery.by_camera(), gallery.verify()) == ([], {}, [])
    assert gallery.info().first_time is None


def test_a_sample_is_some_of_the_items(gallery):
    put(gallery, range(50), camera=lambda n: f"c{n % 3}")
    gallery.delete([f"k{n}" for n in range(10, 40)])
    there = {item.key: item for item in gallery.items()}
    for count in (1, 7, 20, 1000):
        sample = gallery.sample(count)
        assert 1 <= len(sample) <= count
        assert {item.key: item for item in sample}.items() <= there.items()
        assert len({item.key for item in sample}) == len(sample)
    assert len(gallery.sample(50)) == 20, "each once, where there is room for all"


def test_vectors_come_with_hits_and_by_id(gallery):
    vectors, where = some_vectors(20), Filter(camera="gate")
    put(gallery, map(str, range(20)), camera="gate", track=lambda key: f"t{int(key) // 2}")
    (hits,) = gallery.search(unit(0), k=4)
    found = gallery.vectors_of([*hits, hits[0]])
    assert sorted(found) == sorted(hit.id for hit in hits)
    for hit in hits:
        np.testing.assert_allclose(found[hit.id], vectors[int(hit.item.key)], atol=1e-3)
        assert found[hit.id] @ unit(0)[0] == pytest.approx(hit.score, abs=1e-3)
    for by_track in (False, True):
        best, found_KD = gallery.search_with_vectors(unit(0)[0], 5, where, by_track)
        assert best == gallery.search(unit(0), 5, where, by_track)[0]
        assert len(best) == 5
        fewer, _ = gallery.search_with_vectors(unit(0)[0], 5, where, by_track, certain=2)
        assert fewer == best, "the gallery is small"
        known = gallery.vectors_of(best)
        np.testing.assert_array_equal(found_KD, np.stack([known[hit.id] for hit in best]))
    gallery.delete([hits[1].item.key])
    assert sorted(gallery.vectors_of(hits)) == sorted(hit.id for hit in hits if hit != hits[1])
    with refused("hits_invalid", InputError):
        gallery.vectors_of(["0"])


def test_items_are_found_by_id_with_their_vectors(gallery):
    vectors = some_vectors(3)
    gallery.add([FULL, *items_of("bc")], vectors)
    ids = gallery.ids([FULL.key, "b", "c"])
    full, b, c = ids[FULL.key], ids["b"], ids["c"]
    found = gallery.get([c, full, c, 2**62 + 1, 2**80])
    assert {id_: item.key for id_, (item, _) in found.items()} == {c: "c", full: FULL.key}
    item, vector_D = found[full]
    assert item == FULL
    assert vector_D.dtype == np.float32
    np.testing.assert_allclose(vector_D, vectors[0], atol=2e-3)
    gallery.delete(["c"])
    assert [*gallery.get([c, b])] == [b]
    for odd in ([-1], ["1"], [1.5], "12"):
        with pytest.raises(UsageError):
            gallery.get(odd)


def test_search_ranks_by_cosine(gallery):
    vectors, queries = some_vectors(300), some_vectors(5, seed=1)
    put(gallery, map(str, range(300)))
    scores = queries @ vectors.T
    for line, hits in zip(scores, gallery.search(queries, k=20), strict=True):
        found = [hit.score for hit in hits]
        assert found == sorted(found, reverse=True)
        assert found == pytest.approx(np.sort(line)[::-1][:20].tolist(), abs=2e-3)
        assert found == pytest.approx([line[int(hit.item.key)] for hit in hits], abs=2e-3)
    assert len(gallery.search(queries[:1], k=500)[0]) == 300
    with pytest.raises(UsageError):
        gallery.search(queries, k=0)


def test_equal_scores_are_ordered_by_id(gallery):
    query = unit((1, 0.01))
    gallery.add(items_of(range(30)), unit(*[0] * 30))
    gallery.add(items_of(["better"]), query)
    everything = gallery.search(query, k=31)[0]
    assert everything[0].item.key == "better"
    ids = [hit.id for hit in everything[1:]]
    assert ids == sorted(ids)
    assert len(set(ids)) == 30
    for k in (1, 7, 30):
        assert gallery.search(query, k=k)[0] == everything[:k]


def test_the_same_key_replaces(gallery):
    """And is stored once where it comes twice in one call."""
    twice = [Item(key="c", camera="gate"), Item(key="b"), Item(key="c", time=2)]
    assert gallery.add(twice, unit(0, 1, 2)) == []
    (hit, _) = gallery.search(unit(2), k=5)[0]
    assert hit.item == Item(key="c", camera="gate", time=2)
    assert hit.score == pytest.approx(1, abs=1e-3)
    assert gallery.delete(["b", "c"]) == 2
    gallery.add([Item(key="a", camera="gate", time=1, track="x", attributes={"n": 1})], unit(0))
    (before,) = gallery.search(unit(0), k=1)[0]
    new = [Item(key="b"), Item(key="a", source="s", attributes={"n": 2})]
    assert gallery.add(new, unit(2, 1)) == ["a"]
    assert gallery.delete(["b"]) == 1
    assert gallery.add([Item(key="b")], unit(2)) == []
    assert gallery.delete(["b"]) == 1
    ((after,),) = gallery.search(unit(1), k=5)
    assert after.id == before.id
    assert after.score == pytest.approx(1, abs=1e-3)
    assert after.item == Item(key="a", source="s", camera="gate", attributes={"n": 2})
    assert gallery.count() == 1
    assert gallery.count(Filter(attributes={"n": 1})) == 0
    gallery.add([Item(key="a", camera="door")], unit(2))
    assert next(gallery.items()).camera == "door"
    assert gallery.delete(["a"]) == 1
    gallery.add([Item(key="a")], unit(1))
    assert list(gallery.items()) == [Item(key="a")], "a deleted item leaves no trace"


def test_what_others_did_before_it_was_opened_is_known(place):
    """Three times: a Milvus server that need not wait is seldom late."""
    location = place.empty()
    for n in range(3):
        deleted, kept = f"deleted{n}", f"kept{n}"
        with place.open(location) as other:
            put(other, [deleted, kept], camera="gate")
            other.delete([deleted])
        with place.open(location) as opened:
            assert put(opened, [deleted, kept]) == [kept]
            assert opened.delete([deleted]) == 1
    with place.open(location) as opened:
        assert {item.camera for item in opened.items()} == {"gate"}


SIX = [
    Item(key="a", camera="gate", time=100.0, track="1", attributes={"n": 1, "c": "red"}),
    Item(key="b", camera="gate", time=200.5, track="2", attributes={"n": 1.0, "c": "Red"}),
    Item(key="c", camera="door", time=300.0, track="1", attributes={"n": True, "c": ""}),
    Item(key="d", camera="door", time=-5.0, attributes={"n": "1", "c": None}),
    Item(key="e", track="1", attributes={"n": [1], "c": {"red": 1}}),
    Item(key="f", camera="", track="", time=1e9, attributes={"n": 2**53 + 1}),
]


@pytest.fixture
def filtered(gallery):
    gallery.add(SIX, unit(0, 1, 2, 3, 4, 5))
    return gallery


FILTERS = [
    (Filter(), "abcdef"),
    (Filter(camera="gate"), "ab"),
    (Filter(camera="GATE"), ""),
    (Filter(camera=""), "f"),
    (Filter(camera=("gate", "door", "nowhere")), "abcd"),
    (Filter(track="1"), "ace"),
    (Filter(track=""), "f"),
    (Filter(since=200.5), "bcf"),
    (Filter(since=math.nextafter(200.5, math.inf)), "cf"),
    (Filter(until=200.5), "ad"),
    (Filter(until=math.nextafter(200.5, math.inf)), "abd"),
    (Filter(since=-5, until=300), "abd"),
    (Filter(since=-math.inf), "abcdf"),
    (Filter(since=math.inf), ""),
    (Filter(until=math.inf), "abcdf"),
    (Filter(until=-math.inf), ""),
    *((Filter(attributes=attributes), found) for attributes, found in (
        ({"n": 1}, "ab"), ({"n": 1.0}, "ab"), ({"n": True}, "c"), ({"n": "1"}, "d"),
        ({"n": 2**53 + 1}, "f"), ({"n": float(2**53)}, ""), ({"c": "red"}, "a"), ({"c": ""}, "c"),
        ({"missing": 0}, ""), ({"n": 1, "c": "Red"}, "b"),
    )),
    (Filter(camera="gate", since=150, until=250, track="2", attributes={"c": "Red"}), "b"),
]  # fmt: skip


def test_filters(filtered):
    for where, expected in FILTERS:
        found = keys_of(filtered.search(unit(9), k=10, where=where)[0])
        assert found == keys_of(filtered.items(where)) == list(expected), where
        assert filtered.count(where) == len(expected), where


def test_attributes_are_equal_by_kind_and_value(gallery):
    values = [1, 1.0, True, "1", "true", 0, False, None, [1], {"a": 1}, "ü", 2**62, 0.1]
    by_key = {chr(97 + i): {"x": value, "y": i} for i, value in enumerate(values)}
    put(gallery, by_key, attributes=by_key.get)
    for value, expected in (
        (1, "ab"), (True, "c"), ("1", "d"), ("true", "e"), (0, "f"), (False, "g"), ("ü", "k"),
        (2**62, "l"), (0.1, "m"), ("None", ""),
    ):  # fmt: skip
        assert keys_of(gallery.items(Filter(attributes={"x": value}))) == [*expected], value
        assert gallery.count(Filter(attributes={"x": value, "y": 99})) == 0


def test_odd_texts_match_themselves_only(gallery):
    names = list(dict.fromkeys(ODD_TEXTS))
    gallery.add(
        [Item(key=f"k{text}", camera=text, track=text, attributes={text: text}) for text in names],
        some_vectors(len(names)),
    )
    near = [{f"{text}~": text, "other": {text: text}} for text in names]
    beside = [Item(key=f"near {n}", attributes=one) for n, one in enumerate(near)]
    gallery.add(beside, some_vectors(len(beside)))
    for text in names:
        where = Filter(camera=[text, "nowhere"], track=text, attributes={text: text})
        assert keys_of(gallery.items(where)) == [f"k{text}"], where
    for one in ({"camera": ODD_TEXTS[0]}, {"track": "$"}, {"attributes": {'\\"': '\\"'}}):
        assert gallery.count(Filter(**one)) == 1, one
    assert gallery.count(Filter(camera=names)) == len(names)
    assert gallery.info().cameras == dict.fromkeys(sorted(names), 1)
    assert gallery.delete(names) == gallery.delete_where(Filter(attributes={'"': 1})) == 0
    assert gallery.prune(keep_newest=0, camera='" or id >= 0 or camera == "') == 1
    assert gallery.delete([f"k{text}" for text in names]) == len(names) - 1
    assert gallery.count() == len(near)


def test_by_track_gives_the_best_picture_of_each(gallery):
    names = "key", "camera", "track", "time"
    rows = [
        ("a1", "a", "1", 10), ("a2", "a", "1", 5), ("a3", "a", "1", None), ("b1", "b", "1", 7),
        ("n1", None, "1", None), ("alone", "a", None, 1), ("alone too", "a", None, 2),
    ]  # fmt: skip
    far = unit(*((1, one) for one in (0.3, 0.1, 0.5, 0.2, 0.9, 0.4, 0.6)))
    gallery.add([Item(**dict(zip(names, row, strict=True))) for row in rows], far)

    def found(k=10, **where):
        (hits,) = gallery.search(unit(0), k, Filter(**where), by_track=True)
        return [(hit.item.key, hit.span) for hit in hits]

    every = [
        ("a2", TrackSpan(first_time=5, last_time=10, pictures=3)),
        ("b1", TrackSpan(first_time=7, last_time=7, pictures=1)),
        ("alone", None),
        ("alone too", None),
        ("n1", TrackSpan(first_time=None, last_time=None, pictures=1)),
    ]
    assert found() == every
    assert found(k=2) == every[:2]
    span = TrackSpan(first_time=10, last_time=10, pictures=1)
    assert found(camera="a", since=6) == [("a1", span)]
    first, second = gallery.search(unit(0, 1), k=1, by_track=True)
    assert [hit.item.key for hit in (*first, *second)] == ["a2", "n1"]
    assert first[0].id == gallery.search(unit(0), k=1)[0][0].id


def test_a_long_track_does_not_hide_the_others(gallery):
    near = unit(*[(1, n / 1000) for n in range(400)])
    gallery.add(items_of(range(400), camera="a", track="long"), near)
    others = [Item(key="far", camera="a", track="2"), Item(key="alone", camera="a")]
    gallery.add(others, unit((1, 2), (1, 3)))
    (hits,) = gallery.search(unit(0), k=3, by_track=True)
    assert [hit.item.key for hit in hits] == ["k0", "far", "alone"]
    assert hits[0].span.pictures == 400


def test_delete_says_how_many_were_there(filtered):
    assert filtered.delete(["a", "nothing", "a"]) == 1
    assert filtered.delete(["a"]) == 0
    assert filtered.delete_where(Filter(camera="gate", since=150)) == 1
    assert filtered.delete_where(Filter(camera="gate", since=150)) == 0
    assert filtered.delete_where(Filter(track="1")) == 2
    assert keys_of(filtered.items()) == ["d", "f"]
    assert keys_of(filtered.search(unit(0), k=9)[0]) == ["d", "f"]
    for where in (Filter(), Filter(attributes={})):
        with refused("filter_empty", UsageError):
            filtered.delete_where(where)
    assert filtered.count() == 2


PRUNED = [
    ({"older_than": 200.5}, "bcef"),
    ({"older_than": 1e300}, "e"),
    ({"keep_newest": 2}, "cf"),
    ({"keep_newest": 0}, ""),
    ({"keep_newest": 10**20}, "abcdef"),
    ({"keep_newest": 1, "camera": "gate"}, "bcdef"),
    ({"older_than": 200, "camera": "door"}, "abcef"),
    ({"older_than": 150, "keep_newest": 3}, "bcf"),
    ({"older_than": 400, "keep_newest": 1, "camera": "door"}, "abef"),
]


def test_prune(gallery):
    for options, left in PRUNED:
        gallery.add(SIX, unit(0, 1, 2, 3, 4, 5))
        expected = 6 - len(left)
        assert gallery.count_prunable(**options) == expected, options
        assert gallery.prune(**options) == expected, options
        assert keys_of(gallery.items()) == list(left), options
        assert gallery.count_prunable(**options) == 0, options
    for wrong in ({}, {"keep_newest": -1}, {"older_than": math.nan}):
        for prune in (gallery.prune, gallery.count_prunable):
            with pytest.raises(UsageError):
                prune(**wrong)
    assert gallery.count() == len(left)


def test_prune_keeps_what_was_added_later_among_equals(gallery):
    for number in range(6):
        gallery.add([Item(key=str(number), time=7.0)], unit(number))
    gallery.add([Item(key="9"), Item(key="8")], unit(8, 9))
    gallery.add([Item(key="0", time=7.0)], unit(0))  # Replaced: not newer than it was.
    assert gallery.prune(keep_newest=7) == 1
    assert keys_of(gallery.items()) == list("0123458")
    assert gallery.prune(keep_newest=3) == 4
    assert keys_of(gallery.items()) == list("345")


def test_items_and_vectors_come_by_id(gallery):
    put(gallery, range(20), camera=lambda n: f"c{n % 3}")
    by_key = {f"k{n}": vector for n, vector in enumerate(some_vectors(20))}
    by_id = sorted((hit.id, hit.item.key) for hit in gallery.search(some_vectors(1), k=50)[0])
    order = [key for _, key in by_id]
    assert [item.key for item in gallery.items()] == order
    for batch_size in (7, 1000):
        pages = list(gallery.vectors(batch_size=batch_size))
        assert [item.key for items, _ in pages for item in items] == order
        assert max(len(items) for items, _ in pages) <= batch_size
        for items, part in pages:
            assert part.dtype == np.float32
            np.testing.assert_allclose(part, [by_key[i.key] for i in items], atol=1e-3)
    only = [items for items, _ in gallery.vectors(Filter(camera="c1"), batch_size=10)]
    assert {item.camera for items in only for item in items} == {"c1"}
    with pytest.raises(UsageError):
        gallery.vectors(batch_size=0)


def test_info_says_what_is_there_and_rebuild_leaves_it(filtered):
    filtered.add([Item(key="g", camera="gate", track="9")], unit(6), variant="int8")
    info = filtered.info()
    assert (info.items, info.embed_dim, info.fingerprint) == (7, DIM, FINGERPRINT)
    assert info.location == filtered.location
    assert info.cameras == {"": 1, "door": 2, "gate": 3}
    assert (info.variants, info.tracks) == ({"int8": 1}, 6)
    assert (info.first_time, info.last_time) == (-5.0, 1e9)
    assert filtered.cameras() == ["", "door", "gate"]
    before = filtered.search(unit((1, 2, 3, 4, 5)), k=9)
    filtered.rebuild()
    assert rounded(filtered.search(unit((1, 2, 3, 4, 5)), k=9)) == rounded(before)
    assert filtered.verify() == []
    assert filtered.info().index is not None


def test_what_is_refused_stores_nothing(gallery):
    good, bad = Item(key="good"), Item(key="bad", attributes={"a": math.nan})
    two = unit(0, 1)
    for vectors, fields in (
        (np.concatenate([two[:1], BAD]), {"bad": 1, "first": 1}), (two * 1.1, {"bad": 2}),
        (two[:1], {}), (two[:, :-1], {}), (two[None], {}), (two * 0, {"first": 0}),
        (np.full_like(two, np.inf), {"bad": 2, "first": 0}),
    ):  # fmt: skip
        with refused("vectors_invalid", InputError, **fields):
            gallery.add([good, Item(key="b")], vectors)
    with refused("attributes_invalid", InputError, key="bad"):
        gallery.add([good, bad], unit(0, 1))
    assert gallery.count() == 0
    for query in (BAD, unit(0) * 2, unit(0)[:, :-1]):
        with refused("vectors_invalid", InputError):
            gallery.search(query, k=1)
        with refused("vectors_invalid", InputError):
            gallery.search_with_vectors(query[0], 1)


def test_another_space_is_refused_and_a_distilled_one_opened_on_purpose_alone(place):
    location = place.empty()
    for fingerprint, dim in (("other", DIM), (FINGERPRINT, DIM + 1), ("other", None)):
        for create in {False, dim is not None}:
            with refused("gallery_of_other_model", IntegrityError, found=FINGERPRINT):
                Gallery.open(location, fingerprint, dim, create=create)
    with Gallery.open(location) as gallery:
        assert (gallery.fingerprint, gallery.embed_dim) == (FINGERPRINT, DIM)
        assert gallery.count() == 0
    for fingerprint in (f"sha256:student/{FINGERPRINT}", f"a/b/{FINGERPRINT}"):
        for create in (False, True):
            with refused("gallery_of_distilled_model", IntegrityError):
                Gallery.open(location, fingerprint, DIM, create=create)
        with Gallery.open(location, fingerprint, DIM, allow_distilled=True) as gallery:
            assert gallery.fingerprint == FINGERPRINT
        for other, dim in (("sha256:student/other", DIM), (fingerprint, DIM + 1)):
            with refused("gallery_of_other_model", IntegrityError):
                Gallery.open(location, other, dim, allow_distilled=True)


def test_a_gallery_is_made_only_when_asked_for(place):
    location = place.unused()
    for _ in range(2):
        with refused("gallery_not_found", InputError):
            place.open(location)
        with refused("gallery_space_missing", UsageError):
            Gallery.open(location, create=True)
    with place.open(location, create=True) as gallery:
        gallery.add([FULL], unit(0))
    with place.open(location, create=True) as gallery:  # Once more does no harm.
        assert list(gallery.items()) == [FULL]


def test_everything_is_there_after_opening_again(place):
    location = place.empty()
    vectors = some_vectors(40)
    with place.open(location) as gallery:
        put(gallery, range(40), variant="fp32", camera="gate", time=float)
        assert gallery.delete(["k0"]) == 1
        gallery.add([Item(key="k1", time=1000)], vectors[1:2])
        before = gallery.search(vectors, k=5)
    gallery.close()  # Once more does no harm.
    for use in (
        gallery.count, gallery.info, lambda: list(gallery.items()), lambda: gallery.delete(["a"]),
        lambda: gallery.search(unit(0), k=1), lambda: gallery.add([BARE], unit(0)),
    ):  # fmt: skip
        with refused("gallery_closed", UsageError):
            use()
    with Gallery.open(gallery.location, FINGERPRINT, DIM) as gallery:
        assert rounded(gallery.search(vectors, k=5)) == rounded(before)
        assert gallery.count() == 39
        assert gallery.count(Filter(since=1000)) == 1
        assert gallery.info().variants == {"fp32": 38}


def test_two_objects_see_each_others_changes_at_once(place):
    location = place.empty()
    with place.open(location) as writer, place.open(location) as reader:
        for number in range(3):
            writer.add([Item(key=f"k{number}", camera="gate")], unit(number))
            assert reader.count() == number + 1
            assert reader.search(unit(number), k=1)[0][0].item.key == f"k{number}"
        assert writer.delete(["k0"]) == 1
        assert keys_of(reader.search(unit(0), k=9)[0]) == ["k1", "k2"]
        reader.add([Item(key="k1")], unit(9))
        assert next(iter(writer.search(unit(9), k=1)[0])).item == Item(key="k1", camera="gate")


def test_threads_share_a_gallery(gallery):
    def write(worker):
        for number in range(8):
            gallery.add([Item(key=f"{worker}-{number}", camera=str(worker))], unit(worker))

    def read(worker):
        for _ in range(8):
            for hit in gallery.search(unit(worker), k=5)[0]:
                assert hit.item.camera == hit.item.key.split("-")[0]
            gallery.count(Filter(camera=str(worker)))

    with ThreadPoolExecutor(6) as pool:
        for work in [pool.submit(one, worker) for worker in range(3) for one in (write, read)]:
            work.result(timeout=25)
    assert gallery.info().cameras == {"0": 8, "1": 8, "2": 8}
    assert gallery.verify() == []


def test_cameras_have_numbers_and_times_of_their_pictures(gallery):
    taken = {"gate": [5.0, None, 9.5], "ha'll": [None], "": [-3.0], None: [7.0]}
    for camera, times in taken.items():
        keys = {f"{camera}{number}": time for number, time in enumerate(times)}
        put(gallery, keys, camera=camera, time=keys.get)
    assert gallery.by_camera() == {
        "": CameraInfo(pictures=1, first_time=-3.0, last_time=-3.0),
        "gate": CameraInfo(pictures=3, first_time=5.0, last_time=9.5),
        "ha'll": CameraInfo(pictures=1, first_time=None, last_time=None),
    }
    assert list(gallery.by_camera()) == ["", "gate", "ha'll"] == gallery.cameras()

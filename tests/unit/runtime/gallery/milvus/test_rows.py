"""What Milvus stores of an item, and what a gallery remembers of its latest writes."""

import numpy as np
import pytest

from tests.helpers.gallery_places import DIM, some_vectors
from upperson_milvus import rows
from upperson_milvus.collection import Known, RecentWrites


def test_ids_and_hashes_stay_what_they_are():
    """They are stored: another value here would orphan every collection there is."""
    assert rows.id_of("/crops/000001.jpg") == 7121284735137225458
    assert rows.hashes_of({"n": 1, "c": "röd", "on": True, "x": 0.5}) == [
        "5a645e5c04933eb3a4f639e0b6b66818",
        "e4bc34212defbb240c42d54ac46de7c1",
        "f05505814787bee455519e64a192f803",
        "b838b7388f6811fdbd3d5b706212e679",
    ]


def test_hashes_tell_types_apart_as_filters_do():
    def hash_of(value, name="n"):
        return rows.hashes_of({name: value})[0]

    assert hash_of(1) == hash_of(1.0)
    assert hash_of(0) == hash_of(-0.0)
    different = [1, True, "1", "true", "True", 0, False, "", 0.1, 2**53, 2**53 + 1, '["number"]']
    assert len({hash_of(value) for value in different}) == len(different)
    assert hash_of(1, "a") != hash_of(1, "b")
    assert rows.hashes_of({"a": None, "b": [1], "c": {"d": 1}}) == []


@pytest.mark.parametrize("text", [None, "", "\x01", "\x01\x01", "a\x01", "\x01a", " ", "a"])
def test_texts_come_back(text):
    stored = rows.encode_text(text, "text")
    assert rows.decode_text(stored) == text
    assert (stored == "") == (text is None)


def test_float16_vectors_come_back_from_bytes():
    vectors = some_vectors(3)
    sent = rows.encode_vectors(vectors, "float16")
    assert [row.dtype for row in sent] == [np.float16] * 3
    for received in ([row.tobytes() for row in sent], [[row.tobytes()] for row in sent]):
        back = rows.decode_vectors(received, "float16", DIM)
        assert back.dtype == np.float32
        np.testing.assert_array_equal(back, vectors.astype(np.float16).astype(np.float32))


def test_recent_writes_correct_what_was_read():
    recent = RecentWrites()
    recent.record({1: Known("a", "gate", 5), 2: Known("b", "", 6)})
    recent.record({2: None})
    read = {2: Known("b", "stale", 6), 3: Known("c", "old", 7)}
    recent.update(read, [1, 2, 3])
    assert read == {1: Known("a", "gate", 5), 3: Known("c", "old", 7)}
    forgetful = RecentWrites(seconds=-1)
    forgetful.record({1: Known("a", "gate", 5)})
    read = {}
    forgetful.update(read, [1])
    assert read == {}

"""What may go into a gallery, and what may be searched for, checked before any store is used."""

import enum
import json
import math

import numpy as np
import pytest

from tests.helpers.gallery_places import open_new, some_vectors
from tests.helpers.refused import refused
from upperson_rt.errors import InputError, UsageError
from upperson_rt.gallery import Filter, Gallery, Item
from upperson_rt.gallery.records import attributes_as_json, check_new

CROPS = ["/etc/passwd", "../a.jpg", "a/../../b.jpg", "", ".", "C:/a.jpg", "a\\b.jpg", "a\0b"]


def test_what_is_no_item_or_filter_is_refused():
    for fields in (
        {"time": math.inf}, {"time": "x"}, {"box": (1, 2, 3)}, {"box": "abcd"},
        {"box": (0, 0, math.nan, 1)}, {"camera": 5}, {"attributes": [1]},
        *({"crop": crop} for crop in CROPS),
    ):  # fmt: skip
        with refused("item_invalid", InputError, key="a"):
            Item(key="a", **fields)
    # Those of old galleries are read; new ones are refused.
    for fields in (
        {"time": 1.8e12}, {"time": 10**400}, {"box": (0, 0, 2**31, 1)}, {"camera": "a\0b"},
    ):  # fmt: skip
        with refused("item_invalid", InputError, key="a"):
            check_new([Item(key="a", **fields)])
    for value in ({1, 2}, math.nan, [math.inf], b"x", "\ud800"):
        with refused("attributes_invalid", InputError, key="a"):
            attributes_as_json(Item(key="a", attributes={"a": value}))
    for fields in (
        {"camera": "\udcff"}, {"camera": 5}, {"camera": []}, {"until": "tomorrow"},
        {"since": 2, "until": 2}, {"since": math.nan},
        *({"attributes": {"x": x}} for x in (None, [1], {"a": 1}, math.nan, 1 << 63, b"")),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            Filter(**fields)


Name = enum.Enum("Name", {"GATE": "gate"}, type=str)


@pytest.mark.parametrize("odd", [np.str_("gate"), Name.GATE])
def test_texts_and_numbers_become_plain_ones(tmp_path, odd):
    for key in ("", "a\udc80", 5):
        with pytest.raises(InputError):
            Item(key=key)
    assert Item(key="a", box=np.array([1.5, 2.0, 3.9, 4.0])).box == (1, 2, 3, 4)
    item = Item(key=odd, source=odd, camera=odd, track=odd, crop=odd, attributes={odd: odd})
    where = Filter(camera=[odd], track=odd, attributes={odd: odd})
    texts = (item.key, item.source, item.camera, item.track, item.crop, where.track)
    assert {type(text) for text in (*texts, *where.camera, *where.attributes)} == {str}
    with open_new(tmp_path) as gallery:
        gallery.add([item], some_vectors(1), variant=odd)
        assert gallery.count(where) == gallery.delete([odd]) == 1
        assert gallery.verify() == []


def test_attributes_have_a_depth():
    def nested(depth):
        return {"a": json.loads("[" * (depth - 1) + "]" * (depth - 1))}

    text = attributes_as_json(Item(key="a", attributes=nested(64)))
    assert text.count("[") == 63
    assert attributes_as_json(Item(key="a", attributes={"a": '["\\"{' * 99})).count("{") == 100
    deep = []
    for _ in range(3000):
        deep = [deep]
    for attributes in (nested(65), nested(900), {"a": deep}):
        with refused("attributes_invalid", InputError, key="a"):
            attributes_as_json(Item(key="a", attributes=attributes))


# A location chooses its store


def test_what_names_no_store_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for location in ("nowhere://place/people", "milvus", "milvus:people"):
        with refused("gallery_not_found", InputError, near=None):
            Gallery.open(location)
        open_new(location).close()
        assert (tmp_path / location / "gallery.sqlite").is_file()

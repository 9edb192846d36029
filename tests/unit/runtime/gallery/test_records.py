"""What may go into a gallery, and what can be asked of it, checked before any store is asked."""

import json
import math

import numpy as np
import pytest

from tests.helpers.gallery_places import some_vectors
from upperson_rt.errors import InputError, UsageError
from upperson_rt.gallery import Filter, Item
from upperson_rt.gallery.records import attributes_as_json, check_new, unit_vectors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"key": ""}, "key that is not empty"),
        ({"key": "a", "time": float("inf")}, "time must be finite"),
        ({"key": "a", "box": (1, 2, 3)}, "box must be"),
        ({"key": "a\udc80"}, "not valid Unicode"),
        ({"key": 5}, "key of an item must be a text, found 5"),
        ({"key": "a", "camera": 5}, "item 'a': camera must be a text, found 5"),
        ({"key": "a", "time": "x"}, "time must be finite and in unix seconds, got 'x'"),
        ({"key": "a", "box": "abcd"}, "box must be a list, found 'abcd'"),
        (
            {"key": "a", "box": (0, 0, math.nan, 1)},
            r"box must be .* in pixels, got \(0, 0, nan, 1\)",
        ),
        ({"key": "a", "attributes": [1]}, "attributes must be a mapping"),
    ],
)
def test_items_are_checked(fields, message):
    with pytest.raises(InputError, match=message):
        Item(**fields)


@pytest.mark.parametrize(
    "crop", ["/etc/passwd", "../a.jpg", "a/../../b.jpg", "", ".", "C:/a.jpg", "a\\b.jpg", "a\0b"]
)
def test_a_crop_may_not_leave_its_folder(crop):
    with pytest.raises(InputError, match="crop must be a relative path inside"):
        Item(key="a", crop=crop)


def test_boxes_are_whole_pixels():
    assert Item(key="a", box=np.array([1.5, 2.0, 3.9, 4.0])).box == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"time": 1.8e12}, "in unix seconds, not milliseconds"),
        ({"time": 10**400}, "lie in the years 1 to 9999"),
        ({"box": (0, 0, 2**31, 1)}, "box must be in pixels"),
        ({"camera": "a\0b"}, "camera holds a null character"),
    ],
)
def test_what_is_new_is_checked_more_strictly(fields, message):
    item = Item(key="a", **fields)
    with pytest.raises(InputError, match=f"item 'a': .*{message}"):
        check_new([item])


def test_attributes_have_a_depth():
    def nested(depth):
        return {"a": json.loads("[" * (depth - 1) + "]" * (depth - 1))}

    text = attributes_as_json(Item(key="a", attributes=nested(64)))
    assert text.count("[") == 63
    assert attributes_as_json(Item(key="a", attributes={"a": '["\\"{' * 99})).count("{") == 100
    for depth in (65, 900):
        with pytest.raises(InputError, match="attributes are nested more than 64 deep"):
            attributes_as_json(Item(key="a", attributes=nested(depth)))
    deep = []
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(InputError, match="attributes are nested more than 64 deep"):
        attributes_as_json(Item(key="a", attributes={"a": deep}))


def test_filters_are_checked():
    with pytest.raises(UsageError, match=r"a filter's camera is not valid Unicode: '\\udcff'"):
        Filter(camera="\udcff")
    with pytest.raises(UsageError, match="cameras of a filter must be a list, found 5"):
        Filter(camera=5)
    with pytest.raises(UsageError, match="until must be a time in unix seconds"):
        Filter(until="tomorrow")
    with pytest.raises(UsageError, match="since must be earlier"):
        Filter(since=2, until=2)
    with pytest.raises(UsageError, match="since must be a time"):
        Filter(since=math.nan)
    with pytest.raises(UsageError, match="at least one name"):
        Filter(camera=[])


@pytest.mark.parametrize("value", [None, [1], {"a": 1}, math.nan, math.inf, 1 << 63, b"x"])
def test_only_plain_values_can_be_compared(value):
    with pytest.raises(UsageError, match="compares attributes with"):
        Filter(attributes={"x": value})


def test_what_is_wrong_with_vectors_is_told():
    vectors = some_vectors(3, dim=8)
    assert unit_vectors(vectors, 3, 8, "g") is vectors
    bad = vectors.copy()
    bad[2, 0] = np.nan
    for given, message in (
        (bad, "1 of 3 vectors are not finite .* index 2 with length nan: pass what the encoder"),
        (np.ones((3, 9), np.float32), r"shape \(3, 8\) for gallery g, found \(3, 9\)"),
        (vectors[:2], r"shape \(3, 8\).* found \(2, 8\)"),
        (vectors * 2, "3 of 3 vectors are not finite or not of unit length"),
    ):
        with pytest.raises(InputError, match=message):
            unit_vectors(given, 3, 8, "g")

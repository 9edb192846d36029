"""What may go into a gallery, and what can be asked of it, checked before any store is asked."""

import math

import numpy as np
import pytest

from tests.helpers.gallery_places import some_vectors
from upperson_rt.errors import InputError, UsageError
from upperson_rt.gallery import Filter, Item
from upperson_rt.gallery.records import unit_vectors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"key": ""}, "key that is not empty"),
        ({"key": "a", "time": float("inf")}, "time must be finite"),
        ({"key": "a", "box": (1, 2, 3)}, "box must be"),
        ({"key": "a\udc80"}, "not valid Unicode"),
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


def test_filters_are_checked():
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

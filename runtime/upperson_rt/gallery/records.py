"""Items, hits and filters of a gallery, and what `Gallery.info` returns."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from upperson_rt.arguments import check_list, check_number, check_text, is_finite
from upperson_rt.errors import InputError, UsageError
from upperson_rt.printable import local_time, safe_repr

__all__ = [
    "MAX_NORM_ERROR",
    "CameraInfo",
    "Filter",
    "GalleryInfo",
    "Hit",
    "IndexInfo",
    "Item",
    "Track",
    "TrackSpan",
    "attributes_as_json",
    "check_hits",
    "check_new",
    "first_of_tracks",
    "length_problem",
    "track_of_hit",
    "unit_vectors",
    "with_spans",
]

Track: TypeAlias = tuple[str | None, str]
"""Camera and name: two cameras may use the same name."""

MAX_NORM_ERROR = 0.01  # Far above the rounding of float16, far below a vector not normalised.
EARLIEST_S, LATEST_S = -62_135_596_800.0, 253_402_300_799.0
"""The years 1 to 9999; times in milliseconds lie outside."""
_LARGEST_EDGE = 2**31 - 1
_DEEPEST = 64  # Far from what JSON readers can follow, in Python and in SQLite.
_encode: Callable[[Any], str] = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Item:
    """A picture of a person, without its embedding."""

    key: str
    """Unique in the gallery; for a file its absolute path."""
    source: str | None = None
    """Where the picture is found again: a file, or a stream and frame."""
    camera: str | None = None
    time: float | None = None
    """When it was taken, in unix seconds."""
    track: str | None = None
    """Name of the track: pictures of one person in one sequence of one camera."""
    box: tuple[int, int, int, int] | None = None
    """Where the person is in the source: x0, y0, x1, y1 in pixels, the last two exclusive."""
    crop: str | None = None
    """The saved picture, as a path with forward slashes relative to `Gallery.crops_dir`."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Anything else, as JSON."""

    def __post_init__(self) -> None:
        self._put("key", check_text(self.key, "the key of an item"))
        if not self.key:
            raise InputError("an item needs a key that is not empty", code="item_invalid")
        try:  # The name is put together for what is refused alone: searches make many items.
            for name in ("source", "camera", "track", "crop"):
                if (text := getattr(self, name)) is not None:
                    self._put(name, check_text(text, name))
            if self.time is not None and not is_finite(self.time):
                raise InputError(
                    f"time must be finite and in unix seconds, got {safe_repr(self.time)}"
                )
            if self.box is not None:
                self._put("box", _whole_box(self.box))
            if not isinstance(self.attributes, Mapping):
                raise InputError(f"attributes must be a mapping, got {safe_repr(self.attributes)}")
            if self.crop is not None and not _stays_inside(self.crop):
                raise InputError(
                    "crop must be a relative path inside the folder of crops, such as "
                    f"gate/000001.jpg, got {safe_repr(self.crop)}"
                )
        except InputError as error:
            raise InputError(
                f"item {safe_repr(self.key)}: {error}", code="item_invalid", key=self.key
            ) from error.__cause__

    def _put(self, name: str, value: object) -> None:
        if value is not getattr(self, name):
            object.__setattr__(self, name, value)


def check_new(items: Sequence[Item]) -> list[Item]:
    """Return items that are to be stored; what galleries already hold is read more leniently."""
    found = check_list(items, "items")
    for item in found:
        if not isinstance(item, Item):
            raise InputError(f"expected items, found {safe_repr(item)}")
        if (problem := _unwanted(item)) is not None:
            raise InputError(
                f"item {safe_repr(item.key)}: {problem}", code="item_invalid", key=item.key
            )
    return found


def _unwanted(item: Item) -> str | None:
    for name in ("key", "source", "camera", "track"):
        if "\0" in (getattr(item, name) or ""):
            return f"{name} holds a null character: choose another"
    if item.time is not None and not EARLIEST_S <= item.time <= LATEST_S:
        return (
            "time must be in unix seconds, not milliseconds, and lie in the years 1 to 9999; got "
            f"{safe_repr(item.time)}"
        )
    if item.box is not None and max(map(abs, item.box)) > _LARGEST_EDGE:
        return f"box must be in pixels, got {safe_repr(item.box)}"
    return None


@dataclass(frozen=True, kw_only=True)
class TrackSpan:
    """The pictures of a track that passed the filter of a search."""

    first_time: float | None
    """Unix seconds of the earliest one; None if no picture of the track has a time."""
    last_time: float | None
    pictures: int


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A picture that was found."""

    id: int
    """Number of the item in its gallery; stays the same when the item is added again."""
    score: float
    """Cosine of query and picture, -1 to 1. Compare scores within one query only."""
    item: Item
    span: TrackSpan | None = None
    """The whole track, in searches by track; None for an item without a track."""


def check_hits(hits: object) -> list[Hit]:
    """Return what a search found as a list."""
    found = check_list(hits, "hits")
    for hit in found:
        if not isinstance(hit, Hit) or not isinstance(hit.item, Item):
            raise InputError(
                f"expected hits of a search, found {safe_repr(hit)}", code="hits_invalid"
            )
        check_number(hit.score, "the score of a hit", InputError)
    return found


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which items to look at; conditions that are not None must all hold."""

    camera: str | Sequence[str] | None = None
    """A camera, or several of which any will do."""
    since: float | None = None
    """Unix seconds, inclusive. Items without a time never match."""
    until: float | None = None
    """Unix seconds, exclusive, so that periods can follow each other without overlap."""
    track: str | None = None
    attributes: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    """Top-level keys of the items' attributes and the values they must have. Texts equal texts,
    numbers equal numbers (1 and 1.0 alike), true and false only themselves."""

    def __post_init__(self) -> None:
        if isinstance(self.camera, str):
            name = check_text(self.camera, "a filter's camera", UsageError)
            object.__setattr__(self, "camera", name)
        elif self.camera is not None:
            names = check_list(self.camera, "the cameras of a filter", UsageError)
            plain = tuple(check_text(name, "a filter's camera", UsageError) for name in names)
            object.__setattr__(self, "camera", plain)
        if self.cameras == ():
            raise UsageError(
                "a filter by camera needs at least one name; leave it out for all",
                code="filter_invalid",
            )
        if self.track is not None:
            track = check_text(self.track, "a filter's track", UsageError)
            object.__setattr__(self, "track", track)
        for bound in ("since", "until"):
            if (seconds := getattr(self, bound)) is not None:
                what = f"{bound} must be a time in unix seconds: it"
                object.__setattr__(self, bound, check_number(seconds, what, UsageError))
        if self.since is not None and self.until is not None and self.since >= self.until:
            raise UsageError(
                f"nothing lies between {local_time(self.since)} and {local_time(self.until)}: "
                "since must be earlier than until",
                code="filter_invalid",
            )
        if not isinstance(self.attributes, Mapping):
            raise UsageError(f"attributes must be a mapping, got {safe_repr(self.attributes)}")
        attributes: dict[str, str | int | float | bool] = {}
        for key, value in self.attributes.items():
            name = check_text(key, "the name of an attribute in a filter", UsageError)
            if isinstance(value, str):
                what = "the value of an attribute in a filter"
                attributes[name] = check_text(value, what, UsageError)
            elif _is_comparable(value):
                attributes[name] = value
            else:
                raise UsageError(
                    "a filter compares attributes with a text, a finite number of up to 64 bits, "
                    f"true or false; found {name}={safe_repr(value)}",
                    code="filter_invalid",
                )
        object.__setattr__(self, "attributes", attributes)

    @property
    def cameras(self) -> tuple[str, ...] | None:
        """The cameras of which any will do, or None for all."""
        if self.camera is None:
            return None
        return (self.camera,) if isinstance(self.camera, str) else tuple(self.camera)

    @property
    def conditions(self) -> dict[str, Any]:
        """The fields that are conditions, by name."""
        return {name: value for name, value in vars(self).items() if value not in (None, {})}

    @property
    def is_empty(self) -> bool:
        """Whether every item passes."""
        return not self.conditions


@dataclass(frozen=True, kw_only=True)
class IndexInfo:
    """What answers a search without a filter."""

    kind: str
    """``exact`` or the name of an approximate index, such as ``ivf-sq8``."""
    rows: int
    """Items in it."""
    beside: int = 0
    """Items added since, searched exactly beside it."""
    parameters: Mapping[str, int | float | str] = field(default_factory=dict)
    recall_at_10: float | None = None
    """Share of the exact ten best that it finds, measured when it was made; 1.0 if it is exact."""


@dataclass(frozen=True, kw_only=True)
class CameraInfo:
    """What a gallery holds of one camera."""

    pictures: int
    first_time: float | None
    """Unix seconds of the earliest one; None if none has a time."""
    last_time: float | None


@dataclass(frozen=True, kw_only=True)
class GalleryInfo:
    """A gallery at a glance."""

    location: str
    items: int
    embed_dim: int
    fingerprint: str
    created: str
    generator: str
    schema_version: int
    size_bytes: int | None
    """Bytes on disk without the crops; None where the store does not know."""
    cameras: dict[str, int]
    """Items per camera; those without one are left out."""
    variants: dict[str, int]
    """Items per variant of the bundle that embedded them."""
    tracks: int
    """Number of different tracks, counted per camera."""
    first_time: float | None
    """Unix seconds of the earliest item that has a time."""
    last_time: float | None
    index: IndexInfo | None
    """None where no index has been made yet."""


def attributes_as_json(item: Item) -> str:
    """Return an item's attributes as one object of JSON, in UTF-8."""
    if not item.attributes:
        return "{}"
    problem = f"nested more than {_DEEPEST} deep"
    try:
        text = _encode(dict(item.attributes))
        text.encode("utf-8")
        if text.count("[") + text.count("{") <= _DEEPEST or _depth(text) <= _DEEPEST:
            return text
    except RecursionError:
        pass
    except (TypeError, ValueError) as error:
        problem = f"not JSON: {error}"
    raise InputError(
        f"item {safe_repr(item.key)}: attributes are {problem}",
        code="attributes_invalid",
        key=item.key,
    )


def _depth(text: str) -> int:
    depth = deepest = 0
    for mark in re.findall(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', text):
        depth += (mark in "[{") - (mark in "]}")
        deepest = max(deepest, depth)
    return deepest


def unit_vectors(
    vectors: NDArray[np.float32], count: int | None, embed_dim: int, location: str
) -> NDArray[np.float32]:
    """Return (count, embed_dim) vectors as a contiguous float32 array; any number for None."""
    with np.errstate(over="ignore", invalid="ignore"):
        try:
            array = np.ascontiguousarray(vectors, dtype=np.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"expected vectors of numbers, found {safe_repr(vectors)}") from error
        rows = len(array) if count is None and array.ndim else count
        if array.shape != (rows, embed_dim):
            raise InputError(
                f"expected vectors of shape {(rows, embed_dim)} for gallery {location}, "
                f"found {array.shape}",
                code="vectors_invalid",
            )
        norms = np.sqrt(np.einsum("nd,nd->n", array, array))
        good = np.abs(norms - 1) <= MAX_NORM_ERROR  # Not NaN.
    if not good.all():
        bad = np.flatnonzero(~good)
        raise InputError(
            f"{len(bad)} of {rows} vectors are not finite or not of unit length, the first at "
            f"index {bad[0]} with length {norms[bad[0]]}: pass what the encoder returned",
            code="vectors_invalid",
            bad=len(bad),
            first=int(bad[0]),
        )
    return array


def length_problem(vector_D: NDArray[np.float32]) -> str | None:
    """Say what is wrong with a vector that was stored, or return None."""
    norm = float(np.linalg.norm(vector_D))
    return None if abs(norm - 1) <= MAX_NORM_ERROR else f"vector of length {norm}, expected 1"


def first_of_tracks(ranked: Iterable[_T], track_of: Callable[[_T], Track | None]) -> list[_T]:
    """Return the first of each track and all that have none, in order."""
    return list(iter_first_of_tracks(ranked, track_of))


def iter_first_of_tracks(
    ranked: Iterable[_T], track_of: Callable[[_T], Track | None]
) -> Iterator[_T]:
    """Yield the same, and read only what is taken."""
    seen = set()
    for one in ranked:
        track = track_of(one)
        if track is None or track not in seen:
            seen.add(track)
            yield one


def track_of_hit(hit: Hit) -> Track | None:
    """Return the track of a hit, or None where it stands alone."""
    return None if hit.item.track is None else (hit.item.camera, hit.item.track)


def with_spans(
    found: Sequence[Sequence[Hit]], spans_of: Callable[[set[Track]], Mapping[Track, TrackSpan]]
) -> list[list[Hit]]:
    """Return the hits of each query, each with the span of its track."""
    spans = spans_of({track for hits in found for hit in hits if (track := track_of_hit(hit))})

    def with_span(hit: Hit) -> Hit:
        track = track_of_hit(hit)
        return hit if track is None else replace(hit, span=spans.get(track))

    return [[with_span(hit) for hit in hits] for hits in found]


def _is_comparable(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and -(1 << 63) <= value < 1 << 63


def _whole_box(box: Iterable[Any]) -> tuple[int, int, int, int]:
    if type(box) is tuple and [type(edge) for edge in box] == [int] * 4:
        return box
    edges = check_list(box, "box")
    if len(edges) != 4 or not all(map(is_finite, edges)):
        raise InputError(f"box must be x0, y0, x1, y1 in pixels, got {safe_repr(box)}")
    return (int(edges[0]), int(edges[1]), int(edges[2]), int(edges[3]))


def _stays_inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return (
        bool(parts)
        and ".." not in parts
        and not PurePosixPath(path).is_absolute()
        and not PureWindowsPath(path).anchor
        and "\\" not in path
        and "\0" not in path
    )

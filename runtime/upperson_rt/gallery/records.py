"""What goes into a gallery, what comes out, and what a gallery must be able to do."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError, UsageError

__all__ = ["Filter", "GalleryInfo", "GalleryStore", "Hit", "Item"]


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
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Anything else, as JSON."""

    def __post_init__(self) -> None:
        if not self.key:
            raise InputError("an item needs a key that is not empty")
        try:
            "".join((self.key, self.source or "")).encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"the name {self.key!r} is not valid Unicode: rename it") from error
        if self.time is not None and not math.isfinite(self.time):
            raise InputError(f"item {self.key}: time must be finite, got {self.time}")
        if self.box is not None and len(self.box) != 4:
            raise InputError(f"item {self.key}: box must be x0, y0, x1, y1, got {self.box}")


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A picture that was found."""

    id: int
    """Number of the item in its gallery; stays the same when the item is added again."""
    score: float
    """Cosine of query and picture, -1 to 1. Compare scores within one query only."""
    item: Item


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which items to look at; conditions that are not None must all hold."""

    camera: str | None = None
    since: float | None = None
    """Unix seconds, inclusive. Items without a time never match."""
    until: float | None = None
    """Unix seconds, exclusive, so that periods can follow each other without overlap."""
    track: str | None = None

    def __post_init__(self) -> None:
        if self.since is not None and self.until is not None and self.since >= self.until:
            raise UsageError(
                f"nothing lies between since={self.since} and until={self.until}: "
                "since must be earlier than until"
            )


@dataclass(frozen=True, kw_only=True)
class GalleryInfo:
    """A gallery at a glance."""

    path: str
    items: int
    embed_dim: int
    fingerprint: str
    created: str
    generator: str
    schema_version: int
    size_bytes: int
    cameras: dict[str, int]
    """Items per camera; those without one are left out."""
    variants: dict[str, int]
    """Items per variant of the bundle that embedded them."""
    first_time: float | None
    """Unix seconds of the earliest item that has a time."""
    last_time: float | None


class GalleryStore(Protocol):
    """What searching needs of a gallery, wherever it is stored."""

    def search(
        self, vectors: NDArray[np.float32], k: int, where: Filter | None = None
    ) -> Sequence[list[Hit]]:
        """Find the k best items for each of (Q, D) unit vectors, best first."""

"""What a gallery can do, wherever it is stored."""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import UsageError
from upperson_rt.gallery.records import Filter, GalleryInfo, Hit, Item

__all__ = ["MILVUS_SCHEME", "Gallery", "check_prune", "is_remote"]

MILVUS_SCHEME = "milvus://"

_Self = TypeVar("_Self", bound="Gallery")


def is_remote(location: str | os.PathLike[str]) -> bool:
    """Tell whether a location is a server's, not a folder."""
    return os.fspath(location).startswith(MILVUS_SCHEME)


class Gallery(ABC):
    """Items and their embeddings; a context manager.

        with Gallery.open("gallery", encoder.fingerprint, encoder.embed_dim) as gallery:
            hits = gallery.search(encoder.encode_texts(["a woman in a red coat"]), k=10)[0]

    One object may be used from several threads.
    """

    @classmethod
    def open(
        cls,
        location: str | os.PathLike[str],
        fingerprint: str | None = None,
        embed_dim: int | None = None,
        create: bool = False,
    ) -> "Gallery":
        """Open a gallery: a folder, or ``milvus://host:port/collection``.

        Args:
            location: The folder, or the address of a collection.
            fingerprint: Of the embedding space, `Encoder.fingerprint`; None skips the check,
                which suits looking at a gallery without its bundle.
            embed_dim: D; None skips the check.
            create: Make the gallery where there is none; needs the two above.

        Raises:
            UsageError: `create` without fingerprint or embed_dim.
            InputError: There is no gallery, it cannot be opened, or its schema is newer.
            BackendError: The package for this kind of gallery is not installed.
            IntegrityError: It is damaged or no gallery, or holds another embedding space.
        """
        module, name = (
            ("milvus", "MilvusGallery") if is_remote(location) else ("sqlite", "SqliteGallery")
        )
        engine = cast(
            "type[Gallery]", getattr(import_module(f"upperson_rt.gallery.{module}"), name)
        )
        return engine.open(location, fingerprint, embed_dim, create)

    @property
    @abstractmethod
    def location(self) -> str:
        """What `Gallery.open` takes to open it again."""

    @property
    @abstractmethod
    def embed_dim(self) -> int:
        """D, the length of a vector."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identity of the embedding space."""

    @property
    @abstractmethod
    def crops_dir(self) -> Path | None:
        """Where `Item.crop` is found; None if this gallery keeps no pictures."""

    @abstractmethod
    def add(
        self, items: Sequence[Item], vectors: NDArray[np.float32], variant: str | None = None
    ) -> None:
        """Add items, all or none; durable on return. The same key replaces and keeps its id.

        An item that is replaced keeps its camera if the new one has none. If its crop is another
        one, the earlier file is removed.

        Args:
            items: N items.
            vectors: (N, D) of unit length.
            variant: Of the bundle that embedded them, for the record.

        Raises:
            InputError: A vector has another dimension, is not finite or not of unit length, an
                item cannot be stored, or the gallery cannot be written. Nothing is added.
        """

    @abstractmethod
    def search(
        self,
        vectors: NDArray[np.float32],
        k: int,
        where: Filter | None = None,
        by_track: bool = False,
    ) -> list[list[Hit]]:
        """Find the best items for each query, best first, ties by id.

        Args:
            vectors: (Q, D) queries of unit length.
            k: Hits per query; fewer come back where fewer items pass the filter.
            where: Only items that pass.
            by_track: One hit for each camera and track, its best picture, with `Hit.span` set.
                Items without a track stand alone.

        Raises:
            InputError: A query has another dimension, is not finite or not of unit length.
            UsageError: k is below 1.
            IntegrityError: The gallery is damaged.
        """

    @abstractmethod
    def count(self, where: Filter | None = None) -> int:
        """Return the number of items, or of those that pass a filter."""

    @abstractmethod
    def items(self, where: Filter | None = None) -> Iterator[Item]:
        """Yield the items that pass, by id, of one state of the gallery."""

    @abstractmethod
    def vectors(
        self, where: Filter | None = None, batch_size: int = 1024
    ) -> Iterator[tuple[list[Item], NDArray[np.float32]]]:
        """Yield items that pass, by id, and their (N, D) vectors; at most batch_size at a time."""

    @abstractmethod
    def ids(self, keys: Sequence[str]) -> dict[str, int]:
        """Return `Hit.id` for those of the keys that are there."""

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> int:
        """Delete items by key, and their crops; return how many were there."""

    @abstractmethod
    def delete_where(self, where: Filter) -> int:
        """Delete the items that pass, and their crops; return how many.

        Raises:
            UsageError: The filter is empty: it would delete everything.
        """

    @abstractmethod
    def prune(
        self,
        older_than: float | None = None,
        keep_newest: int | None = None,
        camera: str | None = None,
    ) -> int:
        """Delete old items by age, then by number, and their crops; return how many.

        Args:
            older_than: Unix seconds; items taken before go. Those without a time stay.
            keep_newest: Items that stay, newest by their time. Those without a time count as
                older than all others; among equals the one added later is newer.
            camera: Only items of this camera go, and only they are counted.

        Raises:
            UsageError: Neither is given, or keep_newest is negative.
        """

    @abstractmethod
    def info(self) -> GalleryInfo:
        """Return what the gallery holds."""

    @abstractmethod
    def verify(self) -> list[str]:
        """Check the whole gallery; return what is wrong, one line each, or nothing.

        Raises:
            IntegrityError: It is so damaged that it cannot be read through.
        """

    @abstractmethod
    def rebuild(self) -> None:
        """Make the search index anew from the stored vectors."""

    @abstractmethod
    def close(self) -> None:
        """Close the gallery; the object cannot be used afterwards."""

    def cameras(self) -> list[str]:
        """Return the names of the cameras whose items are in the gallery."""
        return sorted(self.info().cameras)

    def count_prunable(
        self,
        older_than: float | None = None,
        keep_newest: int | None = None,
        camera: str | None = None,
    ) -> int:
        """Return how many items `prune` would delete now."""
        check_prune(older_than, keep_newest)
        where = Filter(camera=camera)
        too_many = 0 if keep_newest is None else max(0, self.count(where) - keep_newest)
        too_old = 0
        if older_than is not None:
            too_old = self.count(Filter(camera=camera, until=older_than))
        return max(too_old, too_many)

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def check_condition(where: Filter) -> None:
    """Check the filter of `Gallery.delete_where`.

    Raises:
        UsageError: It is empty.
    """
    if where.is_empty:
        raise UsageError(
            "this filter is empty and would delete the whole gallery: name a condition"
        )


def check_prune(older_than: float | None, keep_newest: int | None) -> None:
    """Check the arguments of `Gallery.prune`.

    Raises:
        UsageError: Neither is given, or one is out of range.
    """
    if older_than is None and keep_newest is None:
        raise UsageError(
            "prune needs an age (--older-than), a number of pictures to keep (--keep), or both"
        )
    if older_than is not None and not math.isfinite(older_than):
        raise UsageError(f"older_than must be a time in unix seconds, got {older_than}")
    if keep_newest is not None and keep_newest < 0:
        raise UsageError(f"the number of pictures to keep must not be negative, got {keep_newest}")

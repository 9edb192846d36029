"""What a gallery can do, wherever it is stored, and which store a location belongs to.

A store is a class derived from `Gallery`. Other packages add theirs under the entry points
``upperson.stores``, by the scheme of its locations.
"""

import datetime
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

import upperson_rt
from upperson_rt.arguments import (
    check_count,
    check_list,
    check_name,
    check_path,
    check_text,
    is_finite,
)
from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.extensions import extension_names, load_extension
from upperson_rt.gallery.records import (
    CameraInfo,
    Filter,
    GalleryInfo,
    Hit,
    Item,
    check_hits,
    check_new,
    unit_vectors,
)
from upperson_rt.manifest import share_a_space
from upperson_rt.printable import safe_repr

__all__ = [
    "Gallery",
    "Meta",
    "Within",
    "check_filter",
    "check_prune",
    "check_schema_version",
    "known_keys",
    "made_now",
    "no_gallery",
    "read_item",
]

Within: TypeAlias = Callable[[Any, Mapping[str, int], Sequence[str]], None]
"""Is called in the transaction that adds items: with the outbox, `Hit.id` by key, and the keys that
were there before. An error undoes everything."""
_SQLITE = "upperson_rt.gallery.sqlite"  # Imported when a gallery is opened.
_MOST_DIMENSIONS = 65_536
_Self = TypeVar("_Self", bound="Gallery")
_Row = TypeVar("_Row")


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What a gallery says about itself, written when it is made."""

    schema_version: int
    fingerprint: str
    """Identity of the embedding space."""
    embed_dim: int
    created: str
    generator: str


class Gallery(ABC):
    """Items and their embeddings; a context manager.

        with Gallery.open("gallery", encoder.fingerprint, encoder.embed_dim) as gallery:
            hits = gallery.search(encoder.encode_texts(["a woman in a red coat"]), k=10)[0]

    One object may be used from several threads.
    """

    has_outbox: ClassVar[bool] = False
    """Whether `outbox` works."""
    bin: Any = None
    """A `sqlite.bin.Bin` for what can be restored; None if deletions are final here."""
    is_remote: bool = False
    """Whether a server has it, which may be away for a while; it keeps no pictures then."""
    _most_hits: int = 2**31 - 1
    """Largest k of a query."""

    def __init__(self, location: str, meta: Meta, crops_dir: Path | None = None) -> None:
        """Use `Gallery.open`."""
        self.location = location
        """What `Gallery.open` takes to open it again."""
        self.crops_dir = crops_dir
        """Where `Item.crop` is found; None if this gallery keeps no pictures."""
        self.embed_dim = meta.embed_dim
        """D, the length of a vector."""
        self.fingerprint = meta.fingerprint
        """Identity of the embedding space."""

    @classmethod
    def open(
        cls,
        location: str | os.PathLike[str],
        fingerprint: str | None = None,
        embed_dim: int | None = None,
        create: bool = False,
        *,
        allow_distilled: bool = False,
    ) -> "Gallery":
        """Open a gallery: a folder, or ``milvus://host:port/collection``.

        Args:
            location: The folder, or the address of a collection.
            fingerprint: Of the embedding space, `Encoder.fingerprint`; None skips the check,
                which suits looking at a gallery without its bundle.
            embed_dim: D; None skips the check.
            create: Make the gallery where there is none; needs the two above.
            allow_distilled: Also open one that was made with the model's student or teacher (see
                `upperson_rt.manifest.space_fingerprint`): to search it with sentences, not to add
                to it.

        Raises:
            UsageError: `create` without fingerprint or embed_dim, or a malformed location.
            InputError: There is no gallery, it cannot be opened, or its schema is another.
            BackendError: The package for this kind of gallery is not installed, or its server does
                not answer.
            IntegrityError: It is damaged or no gallery, or holds another embedding space.
        """
        if fingerprint is not None:
            fingerprint = check_name(fingerprint, "the fingerprint of a gallery", UsageError)
        if embed_dim is not None:
            embed_dim = check_count(embed_dim, "embed_dim", most=_MOST_DIMENSIONS)
        space = None
        if create:
            if fingerprint is None or embed_dim is None:
                raise UsageError(
                    "creating a gallery needs its fingerprint and embed_dim",
                    code="gallery_space_missing",
                )
            space = fingerprint, embed_dim
        if isinstance(location, str) and "://" in location:
            place = check_text(location, "the address of a gallery")
        else:
            place = check_path(location, "the location of a gallery")
        gallery = _store_of(place)._open(place, space)
        found = gallery.fingerprint, gallery.embed_dim
        if fingerprint in (None, found[0]) and embed_dim in (None, found[1]):
            return gallery
        is_distilled = embed_dim in (None, found[1]) and share_a_space(str(fingerprint), found[0])
        if is_distilled and allow_distilled:
            return gallery
        gallery.close()
        if is_distilled:
            raise IntegrityError(
                f"gallery {gallery.location} was made with the student or the teacher of the "
                "bundle's model: pictures of the two must not be mixed; use the bundle it was made "
                "with, or search it all the same with  upperson-rt query --allow-distilled",
                code="gallery_of_distilled_model",
                path=gallery.location,
            )
        raise IntegrityError(
            f"gallery {gallery.location} holds embeddings of another model: use the bundle it "
            "was made with, or index the pictures again into another folder with  --gallery  "
            f"(the bundle's model is {fingerprint or f'of {embed_dim} dimensions'}, the "
            f"gallery's {found[0]} of {found[1]} dimensions)",
            code="gallery_of_other_model",
            path=gallery.location,
            expected=fingerprint,
            found=found[0],
        )

    def add(
        self,
        items: Sequence[Item],
        vectors: NDArray[np.float32],
        variant: str | None = None,
        within: Within | None = None,
    ) -> list[str]:
        """Add items, all or none; durable on return. The same key replaces and keeps its id.

        An item that is replaced keeps its camera if the new one has none. If its crop is another
        one, the earlier file is removed.

        Args:
            items: N items.
            vectors: (N, D) of unit length.
            variant: Of the bundle that embedded them, for the record.
            within: Writes to the outbox in the same transaction; see `has_outbox`.

        Returns:
            The keys that were there before: those items were replaced.

        Raises:
            InputError: A vector has another dimension, is not finite or not of unit length, an
                item cannot be stored, or the gallery cannot be written. Nothing is added.
            BackendError: A server failed or does not answer. What it had taken before that may be
                stored; adding it again does no harm.
        """
        new = check_new(items)
        if variant is not None:
            variant = check_name(variant, "the variant of a bundle")
        unit_ND = unit_vectors(vectors, len(new), self.embed_dim, self.location)
        if not new:
            return []
        if within is None:
            return self._add(new, unit_ND, variant)
        return self._add_within(new, unit_ND, variant, within)

    @property
    def is_read_only(self) -> bool:
        """Whether it could not be written to when it was opened: changes are refused."""
        return False

    def outbox(self, write: bool = False) -> AbstractContextManager[Any]:
        """Give the outbox in a transaction, which is committed at the end if it writes.

        It is what the service ``outbox`` makes, see `upperson_alerts.outbox`.

        Raises:
            InputError: This kind of gallery has none, see `has_outbox`.
        """
        raise self._no_outbox()

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
            UsageError: k is out of range.
            BackendError: A server failed or does not answer.
            IntegrityError: The gallery is damaged.
        """
        k = check_count(k, "k", most=self._most_hits)
        where = check_filter(where)
        queries_QD = unit_vectors(vectors, None, self.embed_dim, self.location)
        if not len(queries_QD):
            return []
        return self._search(queries_QD, k, where, by_track)

    def search_with_vectors(
        self,
        vector: NDArray[np.float32],
        k: int,
        where: Filter | None = None,
        by_track: bool = False,
        certain: int | None = None,
    ) -> tuple[list[Hit], NDArray[np.float32]]:
        """Find the best items for one (D,) query as `search` does, with their (K, D) vectors.

        Items that have left the gallery meanwhile are left out. ``certain`` is how many of the hits
        are as surely the best ones as in a search for that number; the others may lack some that
        score higher. Fewer take less time in a large gallery. By default it is ``k``.
        """
        k = check_count(k, "k", most=self._most_hits)
        certain = k if certain is None else min(k, check_count(certain, "certain"))
        query_1D = unit_vectors(vector[None], 1, self.embed_dim, self.location)
        return self._search_with_vectors(query_1D, k, check_filter(where), by_track, certain)

    def count(self, where: Filter | None = None) -> int:
        """Return the number of items, or of those that pass a filter."""
        return self._count(check_filter(where))

    def items(self, where: Filter | None = None) -> Iterator[Item]:
        """Yield the items that pass, by id, of one state of the gallery."""
        return self._items(check_filter(where))

    def sample(self, count: int) -> list[Item]:
        """Return some of the items, at most ``count``, from all over the gallery.

        Raises:
            UsageError: count is below 1.
        """
        return self._sample(check_count(count, "count"))

    def vectors(
        self, where: Filter | None = None, batch_size: int = 1024
    ) -> Iterator[tuple[list[Item], NDArray[np.float32]]]:
        """Yield items that pass, by id, and their (N, D) vectors; at most batch_size at a time."""
        return self._vectors(check_filter(where), check_count(batch_size, "batch_size"))

    def vectors_of(self, hits: Sequence[Hit]) -> dict[int, NDArray[np.float32]]:
        """Return (D,) vectors by `Hit.id`, for those of the hits that are still there."""
        return self._vectors_of({hit.id for hit in check_hits(hits)})

    @abstractmethod
    def ids(self, keys: Sequence[str]) -> dict[str, int]:
        """Return `Hit.id` for those of the keys that are there."""

    def get(self, ids: Sequence[int]) -> dict[int, tuple[Item, NDArray[np.float32]]]:
        """Return the items that are there by `Hit.id`, each with its (D,) vector.

        Raises:
            UsageError: They are no whole numbers from 0.
            IntegrityError: One of the items is damaged.
        """
        found = check_list(ids, "ids", UsageError)
        wanted = {check_count(one, "an id", least=0, most=None) for one in found}
        return self._get(sorted(one for one in wanted if one < 1 << 63))

    def cameras(self) -> list[str]:
        """Return the names of the cameras whose items are in the gallery."""
        return sorted(self.info().cameras)

    @abstractmethod
    def by_camera(self) -> dict[str, CameraInfo]:
        """Return what is there of each camera, by name; items without a camera are left out."""

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> int:
        """Delete items by key, also from the `bin`, and their crops; return how many were there.

        Raises:
            InputError: A frame or clip of `watch` that may show them cannot be removed
                (``clips_not_removed``), as in `delete_where` and `prune`. All items stay then,
                unless the file came during the deletion.
        """

    def delete_where(self, where: Filter) -> int:
        """Delete the items that pass, and their crops; return how many.

        A gallery in a folder also deletes the newest frames of cameras that pass (`snapshots`).

        Raises:
            UsageError: The filter is empty: it would delete everything.
        """
        if check_filter(where).is_empty:
            raise UsageError(
                "this filter is empty and would delete the whole gallery: name a condition",
                code="filter_empty",
            )
        return self._delete_where(where)

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
            UsageError: Neither is given, or one is out of range.
        """
        check_prune(older_than, keep_newest)
        return self._prune(_too_old(older_than, camera), keep_newest, Filter(camera=camera))

    def count_prunable(
        self,
        older_than: float | None = None,
        keep_newest: int | None = None,
        camera: str | None = None,
    ) -> int:
        """Return how many items `prune` would delete now."""
        check_prune(older_than, keep_newest)
        too_old = _too_old(older_than, camera)
        old = 0 if too_old is None else self.count(too_old)
        extra = 0 if keep_newest is None else self.count(Filter(camera=camera)) - keep_newest
        return max(old, extra)

    @abstractmethod
    def info(self) -> GalleryInfo:
        """Return what the gallery holds."""

    def reusable_bytes(self) -> int:
        """Return how many bytes of its files are free for new items, see `Retention`."""
        return 0

    @abstractmethod
    def verify(self) -> list[str]:
        """Check the whole gallery; return what is wrong, one line each, or nothing.

        Raises:
            IntegrityError: It is so damaged that it cannot be read through.
        """

    def check(self) -> None:
        """Check quickly that the gallery answers and is not damaged.

        Raises:
            IntegrityError: It is damaged.
        """
        self.count()

    @abstractmethod
    def rebuild(self) -> None:
        """Make the search index anew from the stored vectors."""

    @abstractmethod
    def close(self) -> None:
        """Close the gallery; the object cannot be used afterwards."""

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # What a store does after the checks above.

    @classmethod
    @abstractmethod
    def _open(cls, location: str, create: tuple[str, int] | None) -> "Gallery":
        """Open a gallery; make it for a fingerprint and embed_dim where there is none."""

    @abstractmethod
    def _add(
        self, items: Sequence[Item], vectors_ND: NDArray[np.float32], variant: str | None
    ) -> list[str]: ...

    @abstractmethod
    def _search(
        self, queries_QD: NDArray[np.float32], k: int, where: Filter, by_track: bool
    ) -> list[list[Hit]]: ...

    def _search_with_vectors(
        self, query_1D: NDArray[np.float32], k: int, where: Filter, by_track: bool, certain: int
    ) -> tuple[list[Hit], NDArray[np.float32]]:
        (hits,) = self._search(query_1D, k, where, by_track)
        vectors = self._vectors_of({hit.id for hit in hits})
        there = [hit for hit in hits if hit.id in vectors]
        found = [vectors[hit.id] for hit in there]
        return there, np.array(found, np.float32).reshape(len(there), self.embed_dim)

    def _add_within(
        self,
        items: Sequence[Item],
        vectors_ND: NDArray[np.float32],
        variant: str | None,
        within: Within,
    ) -> list[str]:
        """As `_add`, and call ``within`` in the same transaction."""
        raise self._no_outbox()

    def _no_outbox(self) -> InputError:
        return InputError(
            f"gallery {self.location} has no outbox for alerts: use a gallery in a folder",
            code="outbox_unsupported",
            path=self.location,
        )

    @abstractmethod
    def _get(self, ids: Sequence[int]) -> dict[int, tuple[Item, NDArray[np.float32]]]: ...

    def _vectors_of(self, ids: set[int]) -> dict[int, NDArray[np.float32]]:
        return {id_: vector for id_, (_, vector) in self._get(sorted(ids)).items()}

    @abstractmethod
    def _count(self, where: Filter) -> int: ...

    @abstractmethod
    def _items(self, where: Filter) -> Iterator[Item]: ...

    @abstractmethod
    def _sample(self, count: int) -> list[Item]: ...

    @abstractmethod
    def _vectors(
        self, where: Filter, batch_size: int
    ) -> Iterator[tuple[list[Item], NDArray[np.float32]]]: ...

    @abstractmethod
    def _delete_where(self, where: Filter) -> int: ...

    @abstractmethod
    def _prune(self, too_old: Filter | None, keep_newest: int | None, scope: Filter) -> int:
        """Delete what passes ``too_old``, then of what passes ``scope`` all but the newest."""


def _store_of(location: str) -> type[Gallery]:
    """Return the store of a location: by its scheme an extension, else SQLite in a folder."""
    scheme, separator, _ = location.partition("://")
    if separator and scheme in extension_names("stores"):
        return cast("type[Gallery]", load_extension("stores", scheme))
    return cast("type[Gallery]", import_module(_SQLITE).SqliteGallery)


def check_filter(where: object) -> Filter:
    """Return a filter; an empty one, which everything passes, for None."""
    if where is None:
        return Filter()
    if not isinstance(where, Filter):
        raise UsageError(
            f"where must be a filter, such as Filter(camera='gate'), found {safe_repr(where)}"
        )
    return where


def known_keys(keys: Sequence[str]) -> list[str]:
    """Return the keys that are Unicode: a gallery holds no other, but names of files may be."""
    found = check_list(keys, "keys", UsageError)
    if other := [key for key in found if not isinstance(key, str)]:
        raise UsageError(f"keys must be texts, found {safe_repr(other[0])}")
    return [
        str.__str__(key) for key in found if not any("\ud800" <= one <= "\udfff" for one in key)
    ]


def made_now() -> dict[str, str]:
    """Return when and by what a gallery is being made, for its `Meta`."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "created": now.isoformat("T", "seconds"),
        "generator": f"upperson-rt {upperson_rt.__version__}",
    }


def check_prune(older_than: float | None, keep_newest: int | None) -> None:
    """Check the arguments of `Gallery.prune`."""
    if older_than is None and keep_newest is None:
        raise UsageError(
            "prune needs an age (--older-than), a number of pictures to keep (--keep), or bytes "
            "(--keep-bytes)",
            code="prune_without_limit",
        )
    if older_than is not None and not is_finite(older_than):
        raise UsageError(f"older_than must be a time in unix seconds, got {safe_repr(older_than)}")
    if keep_newest is not None:
        check_count(keep_newest, "the number of pictures to keep", least=0, most=None)


def _too_old(older_than: float | None, camera: str | None) -> Filter | None:
    return None if older_than is None else Filter(camera=camera, until=older_than)


def check_schema_version(location: str, found: int, known: int) -> None:
    """Raise an InputError where a gallery's schema is not the one that this program knows."""
    if found == known:
        return
    reads = f"{known} only: index the pictures again into another place with  --gallery"
    if found > known:
        reads = f"up to {known}: update it with  pip install -U upperson-rt"
    raise InputError(
        f"gallery {location} has schema version {found}, this program reads {reads}",
        code="schema_unsupported",
        found=found,
    )


def no_gallery(location: str, near: str | None = None) -> InputError:
    """Return the error for a location where there is none, but perhaps one near it."""
    advice = ": make one with  upperson-rt index PATH...  or name another with  --gallery"
    fields = {"path": location}
    if near is not None:
        advice = f", but there is one at {near}: name it with  --gallery"
        fields["near"] = near
    return InputError(f"no gallery at {location}{advice}", code="gallery_not_found", **fields)


def read_item(read: Callable[[_Row], Item], row: _Row, location: str) -> Item:
    """Return the item of a stored row."""
    try:
        return read(row)
    except (KeyError, TypeError, ValueError, RecursionError, InputError) as error:
        raise IntegrityError(
            f"gallery {location} has malformed metadata ({error}): see  upperson-rt gallery verify",
            code="item_damaged",
            path=location,
        ) from error

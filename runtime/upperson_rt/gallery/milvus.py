"""A gallery in Milvus, for when one machine is not enough."""

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.gallery import milvus_collection as collection
from upperson_rt.gallery import milvus_rows as rows
from upperson_rt.gallery.base import Gallery, check_condition, check_prune
from upperson_rt.gallery.milvus_location import MilvusLocation, parse
from upperson_rt.gallery.milvus_recent import Known
from upperson_rt.gallery.milvus_search import (
    MOST_HITS,
    best_of_each_track,
    best_rows,
    with_spans,
)
from upperson_rt.gallery.milvus_table import MilvusTable
from upperson_rt.gallery.records import Filter, GalleryInfo, Hit, IndexInfo, Item
from upperson_rt.gallery.vectors import STORED, check_space, unit_vectors, vector_problem

__all__ = ["MilvusGallery"]


class MilvusGallery(Gallery):
    """Items and their embeddings in a collection of a Milvus server; a context manager.

    What `add` has returned is seen by the next search of any process, unless the location says
    ``consistency=session``. The server keeps it as it is set up to: a cluster in its log storage,
    the single server and milvus-lite in files that survive the process, not the power.

    Several threads and processes may read and write. Ids are hashes of the keys.
    """

    def __init__(self, location: MilvusLocation, client: Any, meta: collection.Meta) -> None:
        """Use `Gallery.open`."""
        self._location = location
        self._table = MilvusTable(location, client, meta.vectors)
        self._meta = meta

    @classmethod
    def open(
        cls,
        location: str | os.PathLike[str],
        fingerprint: str | None = None,
        embed_dim: int | None = None,
        create: bool = False,
    ) -> "MilvusGallery":
        """Open a gallery in Milvus.

        Args:
            location: ``milvus://host:port/collection``; `milvus_location` has all of it.
            fingerprint: Of the embedding space; None skips the check.
            embed_dim: D; None skips the check.
            create: Make the collection where there is none; needs the two above.

        Raises:
            UsageError: `create` without fingerprint or embed_dim, or a malformed location.
            InputError: There is no such collection, or its schema is newer.
            BackendError: pymilvus is not installed, or the server does not answer or agree.
            IntegrityError: Some other collection, or it holds another embedding space.
        """
        place = parse(os.fspath(location))
        if create and (fingerprint is None or embed_dim is None):
            raise UsageError("creating a gallery needs its fingerprint and embed_dim")
        client = collection.connect(place, create)
        try:
            with collection.translated(place):
                meta = collection.open_collection(
                    client, place, fingerprint if create else None, embed_dim if create else None
                )
            check_space(place.text, (meta.fingerprint, meta.embed_dim), fingerprint, embed_dim)
        except BaseException:
            collection.disconnect(place, client)
            raise
        return cls(place, client, meta)

    @property
    def location(self) -> str:
        """The address, without a password."""
        return self._location.text

    @property
    def crops_dir(self) -> Path | None:
        """None: pictures stay where they are."""
        return None

    @property
    def embed_dim(self) -> int:
        """D, the length of a vector."""
        return self._meta.embed_dim

    @property
    def fingerprint(self) -> str:
        """Identity of the embedding space."""
        return self._meta.fingerprint

    def close(self) -> None:
        """Close the connection; the object cannot be used afterwards."""
        self._table.close()

    def add(
        self, items: Sequence[Item], vectors: NDArray[np.float32], variant: str | None = None
    ) -> None:
        """Add items in one request; one whose key is there already is replaced, id kept.

        Args:
            items: N items; 64 MB of them at most, unless the server is set up for more.
            vectors: (N, D) of unit length.
            variant: Of the bundle that embedded them, for the record.

        Raises:
            InputError: A vector has another dimension, is not finite or not of unit length, an
                item cannot be stored, or there are too many. Nothing is added.
            IntegrityError: Two keys have the same id. Nothing is added.
            BackendError: The server failed or does not answer. What it had taken before that may
                be stored; adding it again does no harm.
        """
        unit = unit_vectors(vectors, len(items), self.embed_dim, self.location)
        encoded = rows.encode_vectors(unit, self._meta.vectors)
        ids = [rows.id_of(item.key) for item in items]
        new: dict[int, dict[str, Any]] = {}
        with self._table.writing:
            known = self._table.known(ids)
            now = time.time_ns()
            for place, (id_, item, vector) in enumerate(zip(ids, items, encoded, strict=True)):
                row = rows.row_from_item(item)
                before = known.get(id_, Known(row["key"], "", now + place))
                if before.key != row["key"]:
                    raise IntegrityError(
                        f"the keys '{item.key}' and '{before.key}' have the same id {id_} in "
                        f"gallery {self.location}: rename one of them"
                    )
                known[id_] = Known(before.key, row["camera"] or before.camera, before.added)
                new[id_] = {
                    **row,
                    "id": id_,
                    "camera": known[id_].camera,
                    "added": before.added,
                    "variant": rows.encode_text(variant, "the variant"),
                    "vector": vector,
                }
            self._table.write(new, known)

    def search(
        self,
        vectors: NDArray[np.float32],
        k: int,
        where: Filter | None = None,
        by_track: bool = False,
    ) -> list[list[Hit]]:
        """Find the best items for each query, best first, ties by id.

        Exact with the index ``flat``, which is the default.

        Args:
            vectors: (Q, D) queries of unit length.
            k: Hits per query, at most 16383.
            where: Only items that pass.
            by_track: One hit for each camera and track.

        Raises:
            InputError: A query has another dimension, is not finite or not of unit length.
            UsageError: k is out of range.
            BackendError: The server failed or does not answer.
        """
        if not 1 <= k < MOST_HITS:
            raise UsageError(f"k must be from 1 to {MOST_HITS - 1}, got {k}")
        queries = unit_vectors(vectors, len(vectors), self.embed_dim, self.location)
        condition = rows.expression_of_filter(where)
        if not by_track:
            return best_rows(self._table.search, queries, k, condition)
        found = [
            best_of_each_track(self._table.search, queries[row : row + 1], k, condition)
            for row in range(len(queries))
        ]
        return with_spans(found, condition, self._table.rows)

    def count(self, where: Filter | None = None) -> int:
        """Return the number of items, or of those that pass a filter."""
        return self._table.count(rows.expression_of_filter(where))

    def items(self, where: Filter | None = None) -> Iterator[Item]:
        """Yield the items that pass, by id; of one state of the gallery from Milvus 2.4 on."""
        for row in self._table.rows(rows.expression_of_filter(where), rows.METADATA):
            yield self._table.item(row)

    def vectors(
        self, where: Filter | None = None, batch_size: int = 1024
    ) -> Iterator[tuple[list[Item], NDArray[np.float32]]]:
        """Yield items that pass, by id, and their vectors, at most batch_size at a time."""
        condition = rows.expression_of_filter(where)
        for page in self._table.pages(condition, (*rows.METADATA, "vector"), batch_size):
            yield (
                [self._table.item(row) for row in page],
                rows.decode_vectors(
                    [row["vector"] for row in page], self._meta.vectors, self.embed_dim
                ),
            )

    def ids(self, keys: Sequence[str]) -> dict[str, int]:
        """Return `Hit.id` for those of the keys that are there."""
        wanted = {rows.id_of(key): key for key in keys}
        there = self._table.present(list(wanted))
        return {
            wanted[id_]: id_ for id_, key in there.items() if rows.decode_text(key) == wanted[id_]
        }

    def delete(self, keys: Sequence[str]) -> int:
        """Delete items by key; return how many were there."""
        wanted = {rows.id_of(key): key for key in keys}
        with self._table.writing:
            there = self._table.present(list(wanted))
            return self._table.delete(
                [id_ for id_, key in there.items() if rows.decode_text(key) == wanted[id_]]
            )

    def delete_where(self, where: Filter) -> int:
        """Delete the items that pass; return how many."""
        check_condition(where)
        with self._table.writing:
            condition = rows.expression_of_filter(where)
            return self._table.delete([row["id"] for row in self._table.rows(condition, ())])

    def prune(
        self,
        older_than: float | None = None,
        keep_newest: int | None = None,
        camera: str | None = None,
    ) -> int:
        """Delete old items; return how many. `Gallery.prune` has the details."""
        check_prune(older_than, keep_newest)
        condition = rows.expression_of_filter(Filter(camera=camera))
        with self._table.writing:
            found = [
                (-np.inf if (taken := rows.decode_time(row["time"])) is None else taken, row)
                for row in self._table.rows(condition, ("time", "added"))
            ]
            found.sort(key=lambda pair: (pair[0], pair[1]["added"]))
            oldest = -np.inf if older_than is None else older_than
            old = [row["id"] for taken, row in found if -np.inf < taken < oldest]
            left = [row["id"] for taken, row in found if not -np.inf < taken < oldest]
            extra = 0 if keep_newest is None else max(0, len(left) - keep_newest)
            return self._table.delete(old + left[:extra])

    def info(self) -> GalleryInfo:
        """Return what the gallery holds; reads four fields of every item."""
        cameras: Counter[str] = Counter()
        variants: Counter[str] = Counter()
        tracks: set[tuple[str, str]] = set()
        times: list[float] = []
        items = 0
        for row in self._table.rows("", ("camera", "variant", "track", "time")):
            items += 1
            for counter, name in ((cameras, "camera"), (variants, "variant")):
                if (text := rows.decode_text(row[name])) is not None:
                    counter[text] += 1
            if row["track"]:
                tracks.add((row["camera"], row["track"]))
            if (taken := rows.decode_time(row["time"])) is not None:
                times = [min([taken, *times]), max([taken, *times])]
        return GalleryInfo(
            location=self.location,
            items=items,
            embed_dim=self.embed_dim,
            fingerprint=self.fingerprint,
            created=self._meta.created,
            generator=self._meta.generator,
            schema_version=self._meta.schema_version,
            size_bytes=None,
            cameras=dict(sorted(cameras.items())),
            variants=dict(sorted(variants.items())),
            tracks=len(tracks),
            first_time=min(times, default=None),
            last_time=max(times, default=None),
            index=self._index(items),
        )

    def verify(self) -> list[str]:
        """Read the whole collection and check it; return what is wrong, one line each, or nothing.

        Looks at every item's id, metadata and vector, and for items that are there twice. Let
        nobody write meanwhile.
        """
        problems = []
        read = 0
        for row in self._table.rows("", (*rows.METADATA, "hashes", "vector")):
            read += 1
            problem = self._problem(row)
            if problem is not None:
                problems.append(f"item {row['key'] or row['id']}: {problem}")
        counted = self.count()
        if counted != read:
            problems.append(
                f"Milvus counts {counted} items, {read} different ones were read: some are there "
                "twice, or somebody has written meanwhile"
            )
        return problems

    def _problem(self, row: Mapping[str, Any]) -> str | None:
        try:
            item = rows.item_from_row(row)
        except (KeyError, TypeError, ValueError, InputError) as error:
            return f"malformed metadata: {error}"
        if row["id"] != rows.id_of(item.key):
            return f"id {row['id']} is not that of its key"
        if sorted(row["hashes"]) != sorted(rows.hashes_of(item.attributes)):
            return "attributes that filters do not see"
        vector = rows.decode_vectors([row["vector"]], self._meta.vectors, self.embed_dim)
        return vector_problem(vector.astype(STORED).tobytes(), self.embed_dim)

    def rebuild(self) -> None:
        """Make the index anew, as the location asks for; nobody can search meanwhile."""
        with self._table.writing, self._table.client() as client:
            client.flush(self._location.collection)
            collection.make_index(client, self._location)

    def _index(self, items: int) -> IndexInfo:
        with self._table.client() as client:
            kind = collection.index_kind(client, self._location)
        exact = kind == "flat"
        return IndexInfo(
            kind="exact" if exact else kind.replace("_", "-"),
            rows=items,
            parameters=collection.INDEX_PARAMETERS.get(kind, {}),
            recall_at_10=1.0 if exact else None,
        )

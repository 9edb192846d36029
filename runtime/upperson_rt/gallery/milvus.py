"""A gallery in Milvus, for when one machine is not enough."""

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.gallery import milvus_collection as collection
from upperson_rt.gallery import milvus_rows as rows
from upperson_rt.gallery.base import Gallery, check_prune
from upperson_rt.gallery.milvus_location import MilvusLocation, parse
from upperson_rt.gallery.milvus_recent import Known, RecentWrites
from upperson_rt.gallery.milvus_search import (
    MOST_HITS,
    best_of_each_track,
    best_rows,
    with_spans,
)
from upperson_rt.gallery.records import Filter, GalleryInfo, Hit, IndexInfo, Item
from upperson_rt.gallery.vectors import STORED, check_space, unit_vectors, vector_problem

__all__ = ["MilvusGallery"]

_AT_A_TIME = 5000


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
        self._connection: Any | None = client
        self._meta = meta
        self._writing = threading.RLock()
        self._recent = RecentWrites()

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
        with self._writing:
            if self._connection is not None:
                collection.disconnect(self._location, self._connection)
            self._connection = None

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
        with self._writing, self._client() as client:
            known = self._known(ids)
            now = time.time_ns()
            for place, (id_, item, vector) in enumerate(zip(ids, items, encoded, strict=True)):
                row = rows.row_from_item(item)
                before = known.get(id_, Known(row["key"], "", now + place))
                if before.key != row["key"]:
                    raise IntegrityError(
                        f"the keys '{item.key}' and '{before.key}' have the same id {id_} in "
                        f"gallery {self.location}: rename one of them"
                    )
                camera = row["camera"] or before.camera
                known[id_] = Known(before.key, camera, before.added)
                new[id_] = {
                    **row,
                    "id": id_,
                    "camera": camera,
                    "added": before.added,
                    "variant": rows.encode_text(variant, "the variant"),
                    "vector": vector,
                }
            if new:
                client.upsert(
                    self._location.collection,
                    list(new.values()),
                    timeout=self._location.options.timeout_s,
                )
                self._recent.record({id_: known[id_] for id_ in new})

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
            return best_rows(self._search, queries, k, condition)
        found = [
            best_of_each_track(self._search, queries[row : row + 1], k, condition)
            for row in range(len(queries))
        ]
        return with_spans(found, condition, self._rows)

    def count(self, where: Filter | None = None) -> int:
        """Return the number of items, or of those that pass a filter."""
        with self._client() as client:
            (row,) = client.query(
                self._location.collection,
                filter=rows.expression_of_filter(where),
                output_fields=["count(*)"],
                **self._read,
            )
        return int(row["count(*)"])

    def items(self, where: Filter | None = None) -> Iterator[Item]:
        """Yield the items that pass, by id; of one state of the gallery from Milvus 2.4 on."""
        for row in self._rows(rows.expression_of_filter(where), rows.METADATA):
            yield self._item(row)

    def vectors(
        self, where: Filter | None = None, batch_size: int = 1024
    ) -> Iterator[tuple[list[Item], NDArray[np.float32]]]:
        """Yield items that pass, by id, and their vectors, at most batch_size at a time."""
        condition = rows.expression_of_filter(where)
        for page in self._pages(condition, (*rows.METADATA, "vector"), batch_size):
            yield (
                [self._item(row) for row in page],
                rows.decode_vectors(
                    [row["vector"] for row in page], self._meta.vectors, self.embed_dim
                ),
            )

    def delete(self, keys: Sequence[str]) -> int:
        """Delete items by key; return how many were there."""
        wanted = {rows.id_of(key): key for key in keys}
        ids = list(wanted)
        with self._writing:
            there = {
                row["id"]
                for start in range(0, len(ids), _AT_A_TIME)
                for row in self._rows(
                    rows.expression_of_ids(ids[start : start + _AT_A_TIME]), ("id", "key")
                )
                if rows.decode_text(row["key"]) == wanted[row["id"]]
            }
            return self._delete(list(there))

    def delete_where(self, where: Filter) -> int:
        """Delete the items that pass; return how many."""
        if where.is_empty:
            raise UsageError("this filter is empty: it would delete the whole gallery")
        with self._writing:
            condition = rows.expression_of_filter(where)
            return self._delete([row["id"] for row in self._rows(condition, ("id",))])

    def prune(
        self,
        older_than: float | None = None,
        keep_newest: int | None = None,
        camera: str | None = None,
    ) -> int:
        """Delete old items; return how many. `Gallery.prune` has the details."""
        check_prune(older_than, keep_newest)
        condition = rows.expression_of_filter(Filter(camera=camera))
        with self._writing:
            found = [
                (-np.inf if (taken := rows.decode_time(row["time"])) is None else taken, row)
                for row in self._rows(condition, ("id", "time", "added"))
            ]
            found.sort(key=lambda pair: (pair[0], pair[1]["added"]))
            extra = 0 if keep_newest is None else max(0, len(found) - keep_newest)
            oldest = -np.inf if older_than is None else older_than
            return self._delete(
                [
                    row["id"]
                    for place, (taken, row) in enumerate(found)
                    if place < extra or -np.inf < taken < oldest
                ]
            )

    def info(self) -> GalleryInfo:
        """Return what the gallery holds; reads four fields of every item."""
        cameras: Counter[str] = Counter()
        variants: Counter[str] = Counter()
        tracks: set[tuple[str, str]] = set()
        times: list[float] = []
        items = 0
        for row in self._rows("", ("camera", "variant", "track", "time")):
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

    def _index(self, items: int) -> IndexInfo:
        with self._client() as client:
            kind = collection.index_kind(client, self._location)
        exact = kind == "flat"
        return IndexInfo(
            kind="exact" if exact else kind.replace("_", "-"),
            rows=items,
            parameters=collection.INDEX_PARAMETERS.get(kind, {}),
            recall_at_10=1.0 if exact else None,
        )

    def verify(self) -> list[str]:
        """Read the whole collection and check it; return what is wrong, one line each, or nothing.

        Looks at every item's id, metadata and vector, and for items that are there twice. Let
        nobody write meanwhile.
        """
        problems = []
        before = 0
        fields = (*rows.METADATA, "id", "hashes", "vector")
        for row in self._rows("", fields):
            before += 1
            problem = self._problem(row)
            if problem is not None:
                problems.append(f"item {row['key'] or row['id']}: {problem}")
        counted = self.count()
        if counted != before:
            problems.append(
                f"Milvus counts {counted} items, {before} different ones were read: some are there "
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
        with self._writing, self._client() as client:
            client.flush(self._location.collection)
            collection.make_index(client, self._location)

    @property
    def _read(self) -> dict[str, Any]:
        """Options of every request that reads."""
        options = self._location.options
        return {
            "consistency_level": options.consistency.capitalize(),
            "timeout": options.timeout_s,
        }

    @contextmanager
    def _client(self) -> Iterator[Any]:
        """Give the client, and translate its errors."""
        client = self._connection
        if client is None:
            raise UsageError(f"gallery {self.location} has been closed")
        with collection.translated(self._location):
            yield client

    def _search(self, queries: NDArray[np.float32], limit: int, condition: str) -> list[list[Hit]]:
        """Return up to `limit` hits of each query, by falling score, then by id."""
        data = rows.encode_vectors(queries, self._meta.vectors)
        found: list[list[Hit]] = []
        step = max(1, MOST_HITS // limit)
        for start in range(0, len(data), step):
            with self._client() as client:
                answer = client.search(
                    self._location.collection,
                    data=data[start : start + step],
                    anns_field="vector",
                    filter=condition,
                    limit=limit,
                    output_fields=list(rows.METADATA),
                    # Each kind of index takes its own and ignores the rest.
                    search_params={
                        "metric_type": "IP",
                        "params": {"ef": max(128, limit), "nprobe": 64},
                    },
                    **self._read,
                )
            for line in answer:
                hits = [
                    Hit(id=hit["id"], score=hit["distance"], item=self._item(hit["entity"]))
                    for hit in line
                ]
                found.append(sorted(hits, key=lambda hit: (-hit.score, hit.id)))
        return found

    def _rows(self, condition: str, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
        for page in self._pages(condition, fields, _AT_A_TIME):
            yield from page

    def _pages(
        self, condition: str, fields: Sequence[str], size: int
    ) -> Iterator[list[dict[str, Any]]]:
        """Yield fields of the rows that pass, by id, at most `size` at a time."""
        arguments = {
            "collection_name": self._location.collection,
            "filter": condition or "id >= 0",
            "output_fields": [*fields, "id"],
        }
        size = min(size, MOST_HITS)
        with self._client() as client:
            first = client.query(**arguments, limit=size, **self._read)
        if len(first) < size:  # All of it, in one request.
            if first:
                yield sorted(first, key=lambda row: row["id"])
            return
        with self._client() as client:
            pages = client.query_iterator(
                **arguments, batch_size=size, timeout=self._location.options.timeout_s
            )
        while True:
            with self._client():
                page = pages.next()
            if not page:
                break
            yield list(page)
        pages.close()

    def _item(self, row: Mapping[str, Any]) -> Item:
        try:
            return rows.item_from_row(row)
        except (KeyError, TypeError, ValueError, InputError) as error:
            raise IntegrityError(
                f"gallery {self.location} has malformed metadata ({error}): see "
                " upperson-rt gallery verify"
            ) from error

    def _known(self, ids: Sequence[int]) -> dict[int, Known]:
        """Return which of these rows are there, with what an item that replaces them keeps."""
        known: dict[int, Known] = {}
        for start in range(0, len(ids), _AT_A_TIME):
            with self._client() as client:
                found = client.query(
                    self._location.collection,
                    filter=rows.expression_of_ids(ids[start : start + _AT_A_TIME]),
                    output_fields=["id", "key", "camera", "added"],
                    consistency_level="Bounded",
                    timeout=self._location.options.timeout_s,
                )
            known |= {row["id"]: Known(row["key"], row["camera"], row["added"]) for row in found}
        self._recent.update(known, ids)
        return known

    def _delete(self, ids: Sequence[int]) -> int:
        for start in range(0, len(ids), _AT_A_TIME):
            part = list(ids[start : start + _AT_A_TIME])
            with self._client() as client:
                client.delete(
                    self._location.collection, ids=part, timeout=self._location.options.timeout_s
                )
            self._recent.record(dict.fromkeys(part))
        return len(ids)

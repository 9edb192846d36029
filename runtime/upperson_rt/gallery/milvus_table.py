"""What a Milvus gallery asks of its collection: read rows, search, write, delete."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.gallery import milvus_collection as collection
from upperson_rt.gallery.milvus_location import MilvusLocation
from upperson_rt.gallery.milvus_recent import Known, RecentWrites
from upperson_rt.gallery.milvus_rows import (
    METADATA,
    encode_vectors,
    expression_of_ids,
    item_from_row,
)
from upperson_rt.gallery.milvus_search import MOST_HITS
from upperson_rt.gallery.records import Hit, Item

__all__ = ["MilvusTable"]

_AT_A_TIME = 5000
"""Rows or ids in one request."""
_LEAST_CANDIDATES = {"ef": 128, "nprobe": 64}
"""How thoroughly indexes that are not exact search; each takes its own and ignores the rest."""


class MilvusTable:
    """A collection that has been opened. Errors of Milvus come out as ours."""

    def __init__(self, location: MilvusLocation, client: Any, vectors: str) -> None:
        self.location = location
        self.writing = threading.RLock()
        """Held by whoever reads in order to write."""
        self._name = location.collection
        self._connection: Any | None = client
        self._vectors = vectors
        self._recent = RecentWrites()
        self._timeout = {"timeout": location.options.timeout_s}
        self._read = {
            "consistency_level": location.options.consistency.capitalize(),
            **self._timeout,
        }

    def close(self) -> None:
        """Close the connection; once more does no harm."""
        with self.writing:
            if self._connection is not None:
                collection.disconnect(self.location, self._connection)
            self._connection = None

    @contextmanager
    def client(self) -> Iterator[Any]:
        """Give the client, and translate its errors.

        Raises:
            UsageError: It has been closed.
        """
        client = self._connection
        if client is None:
            raise UsageError(f"gallery {self.location.text} has been closed")
        with collection.translated(self.location):
            yield client

    def count(self, condition: str) -> int:
        """Return how many rows pass."""
        with self.client() as client:
            (row,) = client.query(
                self._name, filter=condition, output_fields=["count(*)"], **self._read
            )
        return int(row["count(*)"])

    def rows(self, condition: str, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield fields of the rows that pass, by id."""
        for page in self.pages(condition, fields, _AT_A_TIME):
            yield from page

    def pages(
        self, condition: str, fields: Sequence[str], size: int
    ) -> Iterator[list[dict[str, Any]]]:
        """Yield fields of the rows that pass, by id, at most `size` at a time."""
        size = min(size, MOST_HITS)
        arguments = {
            "collection_name": self._name,
            "filter": condition or "id >= 0",
            "output_fields": [*fields, "id"],
        }
        with self.client() as client:
            first = client.query(**arguments, limit=size, **self._read)
        if len(first) < size:  # All of it, in one request.
            if first:
                yield sorted(first, key=lambda row: row["id"])
            return
        with self.client() as client:
            iterator = client.query_iterator(**arguments, batch_size=size, **self._timeout)
        while True:
            with self.client():
                page = iterator.next()
            if not page:
                break
            yield list(page)
        iterator.close()

    def search(self, queries: NDArray[np.float32], limit: int, condition: str) -> list[list[Hit]]:
        """Return up to `limit` hits of each of (Q, D) queries, by falling score, then by id."""
        data = encode_vectors(queries, self._vectors)
        candidates = {name: max(limit, least) for name, least in _LEAST_CANDIDATES.items()}
        found: list[list[Hit]] = []
        step = max(1, MOST_HITS // limit)
        for start in range(0, len(data), step):
            with self.client() as client:
                answer = client.search(
                    self._name,
                    data=data[start : start + step],
                    anns_field="vector",
                    filter=condition,
                    limit=limit,
                    output_fields=list(METADATA),
                    search_params={"metric_type": "IP", "params": candidates},
                    **self._read,
                )
            for line in answer:
                hits = [
                    Hit(id=hit["id"], score=hit["distance"], item=self.item(hit["entity"]))
                    for hit in line
                ]
                found.append(sorted(hits, key=lambda hit: (-hit.score, hit.id)))
        return found

    def item(self, row: Mapping[str, Any]) -> Item:
        """Return the item of a row.

        Raises:
            IntegrityError: The row is damaged.
        """
        try:
            return item_from_row(row)
        except (KeyError, TypeError, ValueError, InputError) as error:
            raise IntegrityError(
                f"gallery {self.location.text} has malformed metadata ({error}): see "
                " upperson-rt gallery verify"
            ) from error

    def present(self, ids: Sequence[int]) -> dict[int, str]:
        """Return which of these rows are there, with their keys as stored."""
        return {
            row["id"]: row["key"]
            for start in range(0, len(ids), _AT_A_TIME)
            for row in self.rows(expression_of_ids(ids[start : start + _AT_A_TIME]), ("key",))
        }

    def known(self, ids: Sequence[int]) -> dict[int, Known]:
        """Return which of these rows are there, with what a row that replaces them keeps.

        Without waiting: what others have written in the last moments may be missing.
        """
        known: dict[int, Known] = {}
        for start in range(0, len(ids), _AT_A_TIME):
            with self.client() as client:
                found = client.query(
                    self._name,
                    filter=expression_of_ids(ids[start : start + _AT_A_TIME]),
                    output_fields=["id", "key", "camera", "added"],
                    consistency_level="Bounded",
                    **self._timeout,
                )
            known |= {row["id"]: Known(row["key"], row["camera"], row["added"]) for row in found}
        self._recent.update(known, ids)
        return known

    def write(self, rows: Mapping[int, dict[str, Any]], known: Mapping[int, Known]) -> None:
        """Add rows by id, or replace those that are there, in one request."""
        if rows:
            with self.client() as client:
                client.upsert(self._name, list(rows.values()), **self._timeout)
            self._recent.record({id_: known[id_] for id_ in rows})

    def delete(self, ids: Sequence[int]) -> int:
        """Delete rows that are there; return how many."""
        for start in range(0, len(ids), _AT_A_TIME):
            part = list(ids[start : start + _AT_A_TIME])
            with self.client() as client:
                client.delete(self._name, ids=part, **self._timeout)
            self._recent.record(dict.fromkeys(part))
        return len(ids)

"""The gallery in Milvus: items to rows of its collection and back."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_milvus import rows
from upperson_milvus.collection import MOST_HITS, Collection, Known
from upperson_milvus.connection import INDEX_PARAMETERS, parse
from upperson_milvus.rows import decode_text, decode_time, expression_of_tracks
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.gallery.protocol import Gallery, known_keys
from upperson_rt.gallery.records import (
    CameraInfo,
    Filter,
    GalleryInfo,
    Hit,
    IndexInfo,
    Item,
    Track,
    TrackSpan,
    first_of_tracks,
    length_problem,
    track_of_hit,
    with_spans,
)

# --- Exact order and hits by track
#
# Milvus decides which of several rows with equal scores it returns, and 2.3 has no grouping by two
# fields. So more rows are fetched until the order of the first k is certain.

_TRACKS_AT_A_TIME = 500


def best_rows(
    collection: Collection, queries_QD: NDArray[np.float32], k: int, condition: str
) -> list[list[Hit]]:
    """Return the k best hits of each query, ties by id."""
    found = []
    for row, hits in enumerate(collection.search(queries_QD, k + 1, condition)):
        limit, best = k + 1, hits
        while len(best) == limit < MOST_HITS and best[k - 1].score == best[-1].score:
            limit = min(MOST_HITS, 2 * limit)
            (best,) = collection.search(queries_QD[row : row + 1], limit, condition)
        found.append(best[:k])
    return found


def best_of_each_track(
    collection: Collection, query_1D: NDArray[np.float32], k: int, condition: str
) -> list[Hit]:
    """Return the best hit of each of the k best tracks for one query."""
    found: list[Hit] = []
    remaining = condition
    limit = min(MOST_HITS, 4 * k + 64)
    while True:
        (hits,) = collection.search(query_1D, limit, remaining)
        best = first_of_tracks(hits, track_of_hit)
        if len(hits) < limit:
            return [*found, *best][:k]
        # A row with the last score may have been left out for one that comes after it by id.
        certain = [hit for hit in best if hit.score > hits[-1].score]
        if len(found) + len(certain) >= k:
            return [*found, *certain][:k]
        if limit < MOST_HITS:
            limit = min(MOST_HITS, 4 * limit)
            continue
        # So many pictures of so few tracks: go on without those tracks.
        found += certain or best
        remaining = " and ".join(filter(None, [condition, _none_of(found)]))


def _none_of(hits: Iterable[Hit]) -> str:
    alone = [hit.id for hit in hits if hit.item.track is None]
    tracks = expression_of_tracks({track for hit in hits if (track := track_of_hit(hit))})
    parts = [f"id not in {alone}" if alone else "", f"not ({tracks})" if tracks else ""]
    return " and ".join(filter(None, parts))


def spans_of(
    collection: Collection, tracks: Iterable[Track], condition: str
) -> dict[Track, TrackSpan]:
    """Return the spans of tracks among the rows that pass."""
    names = sorted(tracks, key=str)
    times: dict[Track, list[float | None]] = {}
    for start in range(0, len(names), _TRACKS_AT_A_TIME):
        part = expression_of_tracks(names[start : start + _TRACKS_AT_A_TIME])
        both = f"({condition}) and ({part})" if condition else part
        for row in collection.rows(both, ("camera", "track", "time")):
            track = decode_text(row["camera"]), decode_text(row["track"]) or ""
            times.setdefault(track, []).append(decode_time(row["time"]))
    return {
        track: TrackSpan(**_first_and_last(taken), pictures=len(taken))
        for track, taken in times.items()
    }


def _first_and_last(times: Iterable[float | None]) -> dict[str, float | None]:
    known = [time for time in times if time is not None]
    return {"first_time": min(known, default=None), "last_time": max(known, default=None)}


# --- The gallery in Milvus: items to rows of its collection and back


class MilvusGallery(Gallery):
    """Items and their embeddings in a collection of a Milvus server; a context manager.

    What `add` has returned is seen by the next search of any process, unless the location says
    ``consistency=session``. The server keeps it as it is set up to: a cluster in its log storage,
    the single server and milvus-lite in files that survive the process, not the power.

    Several threads and processes may read and write. Ids are hashes of the keys, so two keys may
    have one id: the second is refused with an `IntegrityError`. Searches are exact with the index
    ``flat``, which is the default. `add` takes 64 MB of items at most, unless the server is set up
    for more.
    """

    _most_hits = MOST_HITS - 1

    def __init__(self, collection: Collection) -> None:
        super().__init__(collection.location.text, collection.meta)
        self._collection = collection
        self._vector_kind = collection.meta.vectors
        self.is_remote = collection.location.file is None

    @classmethod
    def _open(cls, location: str, create: tuple[str, int] | None) -> "MilvusGallery":
        return cls(Collection(parse(location), create))

    def close(self) -> None:
        self._collection.close()

    def _add(
        self, items: Sequence[Item], vectors_ND: NDArray[np.float32], variant: str | None
    ) -> list[str]:
        encoded = rows.encode_vectors(vectors_ND, self._vector_kind)
        ids = [rows.id_of(item.key) for item in items]
        new: dict[int, dict[str, Any]] = {}
        with self._collection.writing:
            self._collection.check_model()
            known = self._collection.known(ids)
            replaced = [item.key for item, id_ in zip(items, ids, strict=True) if id_ in known]
            now = time.time_ns()
            for place, (id_, item, vector) in enumerate(zip(ids, items, encoded, strict=True)):
                row = rows.row_from_item(item)
                before = known.get(id_, Known(row["key"], "", now + place))
                if before.key != row["key"]:
                    raise IntegrityError(
                        f"the keys '{item.key}' and '{before.key}' have the same id {id_} in "
                        f"gallery {self.location}: rename one of them",
                        code="ids_equal",
                        id=id_,
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
            self._collection.write(new, known)
        return list(dict.fromkeys(replaced))

    def _search(
        self, queries_QD: NDArray[np.float32], k: int, where: Filter, by_track: bool
    ) -> list[list[Hit]]:
        condition = rows.expression_of_filter(where)
        if not by_track:
            return best_rows(self._collection, queries_QD, k, condition)
        found = [
            best_of_each_track(self._collection, queries_QD[row : row + 1], k, condition)
            for row in range(len(queries_QD))
        ]
        return with_spans(found, lambda tracks: spans_of(self._collection, tracks, condition))

    def _count(self, where: Filter) -> int:
        return self._collection.count(rows.expression_of_filter(where))

    def _get(self, ids: Sequence[int]) -> dict[int, tuple[Item, NDArray[np.float32]]]:
        found = [*self._collection.rows_of(ids, (*rows.METADATA, "vector"))]
        return {
            row["id"]: (self._collection.item(row), vector)
            for row, vector in zip(found, self._decoded(found), strict=True)
        }

    def _items(self, where: Filter) -> Iterator[Item]:
        # Of one state of the gallery from Milvus 2.4 on.
        for row in self._collection.rows(rows.expression_of_filter(where), rows.METADATA):
            yield self._collection.item(row)

    def _sample(self, count: int) -> list[Item]:
        found = self._collection.some("", rows.METADATA, count)
        return [self._collection.item(row) for row in found]  # Ids are hashes: of all there are.

    def _vectors(
        self, where: Filter, batch_size: int
    ) -> Iterator[tuple[list[Item], NDArray[np.float32]]]:
        condition = rows.expression_of_filter(where)
        for page in self._collection.pages(condition, (*rows.METADATA, "vector"), batch_size):
            yield [self._collection.item(row) for row in page], self._decoded(page)

    def ids(self, keys: Sequence[str]) -> dict[str, int]:
        wanted = {rows.id_of(key): key for key in known_keys(keys)}
        there = self._collection.rows_of(list(wanted), ("key",))
        return {
            wanted[row["id"]]: row["id"]
            for row in there
            if rows.decode_text(row["key"]) == wanted[row["id"]]
        }

    def delete(self, keys: Sequence[str]) -> int:
        with self._collection.writing:
            return self._collection.delete(list(self.ids(keys).values()))

    def _delete_where(self, where: Filter) -> int:
        with self._collection.writing:
            return self._collection.delete(self._ids_where(where))

    def _prune(self, too_old: Filter | None, keep_newest: int | None, scope: Filter) -> int:
        with self._collection.writing:
            gone = set() if too_old is None else set(self._ids_where(too_old))
            if keep_newest is not None:
                found = self._collection.rows(rows.expression_of_filter(scope), ("time", "added"))
                # Without a time comes first: it is stored as the lowest number.
                left = [(row["time"], row["added"], row["id"]) for row in found]
                left = sorted(row for row in left if row[-1] not in gone)
                gone.update(id_ for *_, id_ in left[: max(0, len(left) - keep_newest)])
            return self._collection.delete(list(gone))

    def info(self) -> GalleryInfo:
        """Return what the gallery holds; reads four fields of every item."""
        cameras: Counter[str] = Counter()
        variants: Counter[str] = Counter()
        tracks: set[tuple[str, str]] = set()
        times: list[float | None] = []
        for row in self._collection.rows("", ("camera", "variant", "track", "time")):
            times.append(rows.decode_time(row["time"]))
            for counter, name in ((cameras, "camera"), (variants, "variant")):
                if (text := rows.decode_text(row[name])) is not None:
                    counter[text] += 1
            if row["track"]:
                tracks.add((row["camera"], row["track"]))
        meta = self._collection.meta
        return GalleryInfo(
            location=self.location,
            items=len(times),
            embed_dim=self.embed_dim,
            fingerprint=self.fingerprint,
            created=meta.created,
            generator=meta.generator,
            schema_version=meta.schema_version,
            size_bytes=None,
            cameras=dict(sorted(cameras.items())),
            variants=dict(sorted(variants.items())),
            tracks=len(tracks),
            **_first_and_last(times),
            index=self._index(len(times)),
        )

    def by_camera(self) -> dict[str, CameraInfo]:
        """Return what is there of each camera; reads two fields of every item."""
        times: dict[str, list[float | None]] = {}
        for row in self._collection.rows("", ("camera", "time")):
            if (camera := rows.decode_text(row["camera"])) is not None:
                times.setdefault(camera, []).append(rows.decode_time(row["time"]))
        return {
            camera: CameraInfo(**_first_and_last(taken), pictures=len(taken))
            for camera, taken in sorted(times.items())
        }

    def verify(self) -> list[str]:
        """Read the whole collection and check it; return what is wrong, one line each, or nothing.

        Looks at every item's id, metadata and vector, and for items that are there twice. No
        process may write meanwhile.
        """
        problems = []
        read = 0
        for row in self._collection.rows("", (*rows.METADATA, "hashes", "vector")):
            read += 1
            problem = self._problem(row)
            if problem is not None:
                problems.append(f"item {row['key'] or row['id']}: {problem}")
        counted = self.count()
        if counted != read:
            problems.append(
                f"Milvus counts {counted} items, {read} different ones were read: some are there "
                "twice, or a process has written meanwhile"
            )
        return problems

    def rebuild(self) -> None:
        """Make the index anew, as the location asks for; no process can search meanwhile."""
        self._collection.make_index()

    def _problem(self, row: Mapping[str, Any]) -> str | None:
        try:
            item = rows.item_from_row(row)
        except (KeyError, TypeError, ValueError, InputError) as error:
            return f"malformed metadata: {error}"
        if row["id"] != rows.id_of(item.key):
            return f"id {row['id']} is not that of its key"
        if sorted(row["hashes"]) != sorted(rows.hashes_of(item.attributes)):
            return "attributes that filters do not see"
        return length_problem(self._decoded([row])[0])

    def _decoded(self, page: Sequence[Mapping[str, Any]]) -> NDArray[np.float32]:
        stored = [row["vector"] for row in page]
        return rows.decode_vectors(stored, self._vector_kind, self.embed_dim)

    def _ids_where(self, where: Filter) -> list[int]:
        condition = rows.expression_of_filter(where)
        return [row["id"] for row in self._collection.rows(condition, ())]

    def _index(self, items: int) -> IndexInfo:
        kind = self._collection.index_kind()
        exact = kind == "flat"
        return IndexInfo(
            kind="exact" if exact else kind.replace("_", "-"),
            rows=items,
            parameters=INDEX_PARAMETERS.get(kind, {}),
            recall_at_10=1.0 if exact else None,
        )

"""Exact order and hits by track on top of a search that only knows the best rows.

Milvus decides by itself which of several rows with equal scores it returns, and 2.3 has no grouping
by two fields. So more rows than needed are fetched, until the order of the first k is certain.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from upperson_rt.gallery.milvus.collection import MOST_HITS, Collection
from upperson_rt.gallery.milvus.rows import decode_text, decode_time, expression_of_tracks
from upperson_rt.gallery.records import Hit, Track, TrackSpan, first_of_tracks, track_of_hit

__all__ = ["best_of_each_track", "best_rows", "spans_of"]

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
        track: TrackSpan(
            first_time=min(known := [time for time in taken if time is not None], default=None),
            last_time=max(known, default=None),
            pictures=len(taken),
        )
        for track, taken in times.items()
    }

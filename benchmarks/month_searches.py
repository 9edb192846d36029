"""Searches in a gallery of a month: their own module, since memory is that of a fresh process."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from upperson_machine.description import resident_bytes

K = 10
_HOW = {"k", "certain", "by_track"}


def month_searches(folder: str, queries: str, filters: dict[str, Any], many: int) -> dict[str, Any]:
    """Open a gallery, time searches on one thread, and repeat them to see memory.

    Args:
        folder: The gallery's.
        queries: A .npy file of (Q, D).
        filters: Arguments of `Filter` and of `Gallery.search_with_vectors` by name.
        many: Searches at the end.

    Returns:
        ``first_answer_s`` from before the opening on; by name ``p50_ms`` and ``p95_ms`` of queries
        that were asked before, and ``first_...`` of the first time; and resident bytes before and
        after the searches at the end.
    """
    began = time.perf_counter()
    import faiss

    from upperson_rt.gallery import Filter, Gallery

    faiss.omp_set_num_threads(1)
    rows = np.load(queries)
    with Gallery.open(folder) as gallery:
        gallery.search(rows[:1], K)
        result: dict[str, Any] = {"first_answer_s": time.perf_counter() - began, "searches": {}}
        for name, options in filters.items():
            how = {"k": K} | {key: options.pop(key) for key in _HOW & options.keys()}
            where = Filter(**options)
            row: dict[str, float] = {}
            result["searches"][name] = row
            for prefix in ("first_", ""):  # Then the rows are in the system's cache.
                times = []
                for query in rows:
                    began = time.perf_counter()
                    gallery.search_with_vectors(query, where=where, **how)
                    times.append(1e3 * (time.perf_counter() - began))
                p50, p95 = np.percentile(times, (50, 95)).tolist()
                row |= {f"{prefix}p50_ms": p50, f"{prefix}p95_ms": p95}
        result["rss_bytes"] = resident_bytes("VmRSS")
        for number in range(many):
            gallery.search(rows[number % len(rows)][None], K)
        result["rss_at_end_bytes"] = resident_bytes("VmRSS")
    return result | {"peak_rss_bytes": resident_bytes("VmHWM")}


def query_each_second(folder: str, queries: str, seconds: float) -> list[tuple[float, float]]:
    """Search once a second, as a console does beside cameras; return starts and durations, s.

    The first search, which opens the index, is not among them: `month_searches` has its time.
    """
    import faiss

    from upperson_rt.gallery import Gallery

    faiss.omp_set_num_threads(1)
    rows, found = np.load(queries), list[tuple[float, float]]()
    with Gallery.open(Path(folder)) as gallery:
        gallery.search(rows[:1], K)
        began = time.monotonic()
        while (now := time.monotonic() - began) < seconds:
            gallery.search(rows[len(found) % len(rows)][None], K)
            took = time.monotonic() - began - now
            found.append((now, took))
            time.sleep(max(0.0, 1.0 - took))
    return found

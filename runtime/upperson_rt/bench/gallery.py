"""The benchmark of a gallery in a folder against the engines below it, in turns."""

import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.bench.gallery_data import SyntheticPeople
from upperson_rt.bench.gallery_start import GalleryStart, measure_gallery_start
from upperson_rt.errors import UsageError
from upperson_rt.gallery import Filter, Gallery, GalleryInfo, Item
from upperson_rt.gallery.sqlite import SqliteGallery
from upperson_rt.gallery.sqlite.rows import STORED
from upperson_rt.gallery.sqlite.segments import flat_index, load_faiss, stored_rows
from upperson_rt.timing import Timing, time_in_turns

__all__ = ["BATCH_ROWS", "GalleryBench", "Insertion", "K", "bench_gallery"]

K = 10
BATCH_ROWS = 256
_QUERIES = 200
_BATCH_QUERIES = 32
_SINGLE_ROWS = 300
_WARMUP = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Insertion:
    """Durable commits of one size, in turns with those of bare SQLite."""

    rows_per_commit: int
    rows: int
    seconds: float
    cpu_seconds: float
    bare_seconds: float
    """Of as many commits of key and vector alone into a table of nothing else."""
    bare_rows: int

    @property
    def rows_per_s(self) -> float:
        """Rows a second by the wall clock."""
        return self.rows / self.seconds

    @property
    def bare_rows_per_s(self) -> float:
        """The same of bare SQLite, which waits for the same disk."""
        return self.bare_rows / self.bare_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class GalleryBench:
    """What was measured."""

    info: GalleryInfo
    insertions: list[Insertion]
    build_s: float
    """The first search of all: makes the index and saves it."""
    start: GalleryStart
    single: dict[str, Timing]
    """One query at a time, by contender; the first is the gallery, the second the bare index."""
    batch: dict[str, Timing]
    """32 queries at a time."""
    recall_at_10: float
    """Of the gallery, against sorting all stored vectors."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values; ``ratio`` is the median relative to the gallery without a filter."""
        gallery = next(iter(self.single.values())).median_s
        return {
            "rows": self.info.items,
            "dim": self.info.embed_dim,
            "index": None if self.info.index is None else asdict(self.info.index),
            "size_bytes": self.info.size_bytes,
            "insertions": [
                asdict(one) | {"rows_per_s": one.rows_per_s, "bare_rows_per_s": one.bare_rows_per_s}
                for one in self.insertions
            ],
            "build_s": self.build_s,
            "start": asdict(self.start),
            "single": {
                name: timing.as_dict(1) | {"ratio": timing.median_s / gallery}
                for name, timing in self.single.items()
            },
            "batch": {name: timing.as_dict(_BATCH_QUERIES) for name, timing in self.batch.items()},
            "recall_at_10": self.recall_at_10,
        }


def bench_gallery(
    rows: int,
    dim: int,
    *,
    threads: int | None = None,
    seconds: float = 2.0,
    folder: Path | None = None,
    progress: Callable[[str], None],
) -> GalleryBench:
    """Fill a gallery with synthetic people, then time it; it is removed afterwards.

    Args:
        rows: Pictures, at least 1000.
        dim: D, at least 2.
        threads: CPU threads of faiss; None lets it choose. numpy's follow OMP_NUM_THREADS.
        seconds: Timed seconds of a contender.
        folder: Where the temporary gallery is made; its disk decides how fast rows are durable.
        progress: Told what is being done.

    Raises:
        UsageError: A number is out of range.
    """
    if rows < 1000 or dim < 2 or not 0 <= seconds < float("inf"):
        raise UsageError(
            f"expected rows from 1000, dim from 2 and seconds from 0, found {rows} rows, dim {dim} "
            f"and {seconds} seconds"
        )
    if threads is not None:
        load_faiss().omp_set_num_threads(threads)
    people = SyntheticPeople(rows, dim)
    with tempfile.TemporaryDirectory(prefix="upperson-bench-", dir=folder) as name:
        path = Path(name)
        with Gallery.open(path / "gallery", "bench", dim, create=True) as gallery:
            assert isinstance(gallery, SqliteGallery)
            progress(f"adding {rows} pictures")
            insertions = list(_insert(gallery, people, path / "bare.sqlite"))
            queries = people.queries(_QUERIES)
            progress("making the index")
            began = time.perf_counter()
            gallery.search(queries[:1], K)
            build_s = time.perf_counter() - began
            progress("timing searches")
            single, batch = _searches(gallery, queries, seconds)
            progress("comparing with all stored vectors")
            recall = _recall(gallery, queries)
            info = gallery.info()
        np.save(path / "queries.npy", queries)
        progress("starting a fresh process")
        start = measure_gallery_start(path / "gallery", path / "queries.npy")
    return GalleryBench(
        info=info,
        insertions=insertions,
        build_s=build_s,
        start=start,
        single=single,
        batch=batch,
        recall_at_10=recall,
    )


def _insert(gallery: Gallery, people: SyntheticPeople, bare_file: Path) -> Iterator[Insertion]:
    """Add all rows in batches, then some one by one; some of both into bare SQLite in between."""
    rows = people.rows - _SINGLE_ROWS
    with closing(sqlite3.connect(bare_file, isolation_level=None)) as bare:
        bare.execute("PRAGMA journal_mode = WAL")
        bare.execute("PRAGMA synchronous = FULL")
        bare.execute("CREATE TABLE items (id INTEGER PRIMARY KEY, key TEXT, vector BLOB)")
        for size, first, stop in ((BATCH_ROWS, 0, rows), (1, rows, people.rows)):
            wall = cpu = bare_wall = 0.0
            done = bare_rows = 0
            every = max(1, (stop - first) // size // 100)
            for number, start in enumerate(range(first, stop, size)):
                end = min(start + size, stop)
                items, vectors = people.items(start, end), people.vectors(start, end)
                began, cpu_began = time.perf_counter(), time.process_time()
                gallery.add(items, vectors)
                wall += time.perf_counter() - began
                cpu += time.process_time() - cpu_began
                done += end - start
                if number % every == 0:
                    bare_wall += _bare_commit(bare, items, vectors)
                    bare_rows += end - start
            yield Insertion(
                rows_per_commit=size,
                rows=done,
                seconds=wall,
                cpu_seconds=cpu,
                bare_seconds=bare_wall,
                bare_rows=bare_rows,
            )


def _bare_commit(
    bare: sqlite3.Connection, items: list[Item], vectors: NDArray[np.float32]
) -> float:
    began = time.perf_counter()
    stored = vectors.astype(STORED)
    bare.execute("BEGIN IMMEDIATE")
    bare.executemany(
        "INSERT INTO items (key, vector) VALUES (?, ?)",
        [(item.key, row.tobytes()) for item, row in zip(items, stored, strict=True)],
    )
    bare.execute("COMMIT")
    return time.perf_counter() - began


def _searches(
    gallery: SqliteGallery, queries: NDArray[np.float32], seconds: float
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    name, bare = _bare_index(gallery)
    numbers = cycle(range(len(queries)))

    def one() -> NDArray[np.float32]:
        number = next(numbers)
        return queries[number : number + 1]

    camera, half = Filter(camera="camera-7"), Filter(since=1_700_000_000.0 + gallery.count() // 2)
    single: dict[str, Callable[[], object]] = {
        "gallery": lambda: gallery.search(one(), K),
        name: lambda: bare(one()),
        "gallery, one camera (1 %)": lambda: gallery.search(one(), K, camera),
        "gallery, newer half": lambda: gallery.search(one(), K, half),
        "gallery, by track": lambda: gallery.search(one(), K, by_track=True),
    }
    some = queries[:_BATCH_QUERIES]
    batch: dict[str, Callable[[], object]] = {
        "gallery": lambda: gallery.search(some, K),
        name: lambda: bare(some),
    }
    return (
        time_in_turns(single, warmup=_WARMUP, rounds=10, seconds=seconds * len(single)),
        time_in_turns(batch, warmup=1, rounds=3, seconds=seconds * len(batch)),
    )


def _bare_index(
    gallery: SqliteGallery,
) -> tuple[str, Callable[[NDArray[np.float32]], object]]:
    """Return faiss called directly, ids and scores only: the gallery's own index where it can be.

    A gallery that is too small for faiss is compared with an exact index made for this.
    """
    faiss = load_faiss()
    snapshot = gallery._index.snapshot
    segments = () if snapshot is None else snapshot.segments
    segment = max(segments, key=lambda part: len(part.ids), default=None)
    if segment is None:
        index = flat_index(gallery.embed_dim, gallery.count())
        done, target = 0, stored_rows(index)
        for _, vectors in gallery.vectors():
            target[done : done + len(vectors)] = vectors.astype(STORED).view(np.uint8)
            done += len(vectors)
        return "faiss flat fp16 alone", lambda rows: index.search(rows, K)
    if segment.nprobe is None:
        return "faiss flat fp16 alone", lambda rows: segment.index.search(rows, K)
    parameters = faiss.SearchParametersIVF(nprobe=segment.nprobe)
    return "faiss IVF-SQ8 alone", lambda rows: segment.index.search(rows, K, params=parameters)


def _recall(gallery: Gallery, queries: NDArray[np.float32]) -> float:
    """Return the share of the ten best of all stored vectors that searches find."""
    best = np.full((len(queries), K), -np.inf, np.float32)
    keys = np.full((len(queries), K), "", object)
    for items, vectors in gallery.vectors(batch_size=8192):
        scores = np.concatenate([best, queries @ vectors.T], axis=1)
        names = np.array([item.key for item in items], object)
        every = np.concatenate([keys, np.broadcast_to(names, (len(queries), len(names)))], axis=1)
        top = np.argpartition(scores, scores.shape[1] - K, axis=1)[:, -K:]
        best, keys = np.take_along_axis(scores, top, 1), np.take_along_axis(every, top, 1)
    found = [gallery.search(query[None], K)[0] for query in queries]
    hits = sum(
        len({hit.item.key for hit in own} & set(row)) for own, row in zip(found, keys, strict=True)
    )
    return hits / keys.size

"""A gallery in a folder against the engines below it, bare faiss and bare SQLite, in turns.

Shapes: Q queries, D dimensions.
"""

import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.gallery_data import SyntheticPeople
from benchmarks.gallery_start import gallery_start
from benchmarks.report import TIMES, Column, conditions, print_report, table, timed_rows
from upperson_autotune.timing import time_in_turns
from upperson_bench.processes import call_in_fresh_process
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug, Threads
from upperson_rt.cli.output import print_note
from upperson_rt.errors import UsageError
from upperson_rt.gallery import Filter, Gallery, Item

INSERTIONS = {
    "rows/s": Column("rows_per_s", "{:.0f}"),
    "CPU us/row": Column("cpu_us_per_row", "{:.0f}"),
    "bare SQLite rows/s": Column("bare_rows_per_s", "{:.0f}"),
}
RATIO = {"ratio": Column("ratio", "{:.2f}x")}
BATCHES = TIMES | RATIO | {"queries/s": Column("items_per_s", "{:.0f}")}

K = 10
CANDIDATES = 4000  # Of a part, as the gallery takes them for the ten best.
BATCH_ROWS = 256
BATCH_QUERIES = 32
_QUERIES = 200
_SINGLE_ROWS = 300
WARMUP = 3

Rows: TypeAlias = NDArray[np.float32]

app = new_app("Time a gallery against bare faiss and bare SQLite.")


@app.command(cls=Command)
def gallery(
    rows: Annotated[
        int, typer.Option("--rows", min=1000, help="Synthetic pictures to fill it with.")
    ] = 100_000,
    dim: Annotated[int, typer.Option("--dim", min=2, help="Length of a vector.")] = 512,
    threads: Threads = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.0, help="Timed seconds of each contender.")
    ] = 2.0,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder",
            help="Where the gallery is made for a while; its disk is measured, too.",
            show_default="the system's temporary folder",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Time adding to and searching in a gallery of synthetic people, against faiss alone.

    The pictures are clustered as crops of people are, and queries are as far from them as
    sentences. Search times of the gallery include fetching the metadata; contenders run in turns.
    Memory and start are those of a fresh process. Set OMP_NUM_THREADS as well to fix numpy's
    threads.

    Example: `python -m benchmarks.gallery --rows 100000 --threads 1`
    """
    if not seconds < float("inf"):
        raise UsageError(f"--seconds must be a finite number from 0, found {seconds}")
    result = conditions(
        "gallery", "faiss-cpu", threads=threads, batch_size=BATCH_QUERIES, warmup=WARMUP
    )
    if threads is not None:
        _faiss().omp_set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="upperson-bench-", dir=folder) as place:
        measured = measure(SyntheticPeople(rows, dim), Path(place), seconds, print_note)
    result |= {"seconds": seconds, "k": K, **measured}
    inserted = {f"{one['rows_per_commit']} rows a commit": one for one in measured["insertions"]}
    tables = [
        table("adding", inserted, INSERTIONS),
        table("one query", measured["single"], TIMES | RATIO),
        table(f"{BATCH_QUERIES} queries", measured["batch"], BATCHES),
    ]
    print_report(result, _facts(result), tables)


def measure(
    people: SyntheticPeople, folder: Path, seconds: float, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Fill a gallery in a folder and time it; return plain values.

    Args:
        people: What to fill it with.
        folder: Empty.
        seconds: Timed seconds of a contender.
        progress: Told what is being done.
    """
    with Gallery.open(folder / "gallery", "bench", people.dim, create=True) as gallery:
        progress(f"adding {people.rows} pictures")
        insertions = list(_insert(gallery, people, folder / "bare.sqlite"))
    queries = people.queries(_QUERIES)
    # Opened anew: the log of a writer is slower to read.
    with Gallery.open(folder / "gallery") as gallery:
        progress("making the index")
        began = time.perf_counter()
        gallery.search(queries[:1], K)  # The first search of all makes the index, and saves it.
        build_s = time.perf_counter() - began
        progress("timing searches")
        name, bare = bare_faiss(gallery)
        single, batch = _searches(gallery, name, bare, queries, seconds)
        progress("comparing with all stored vectors")
        recall = _recall(gallery, queries)
        info = gallery.info()
    np.save(folder / "queries.npy", queries)
    progress("starting a fresh process")
    start = call_in_fresh_process(
        gallery_start, str(folder / "gallery"), str(folder / "queries.npy")
    )
    return {
        "rows": info.items,
        "dim": info.embed_dim,
        "index": None if info.index is None else asdict(info.index),
        "size_bytes": info.size_bytes,
        "insertions": insertions,
        "build_s": build_s,
        "start": start,
        "single": single,
        "batch": batch,
        "recall_at_10": recall,
    }


def _insert(gallery: Gallery, people: SyntheticPeople, bare_file: Path) -> Iterator[dict[str, Any]]:
    """Add all rows in batches, then some one by one; some of both into bare SQLite in between."""
    rows = people.rows - _SINGLE_ROWS
    with closing(sqlite3.connect(bare_file, isolation_level=None)) as bare:
        bare.execute("PRAGMA journal_mode = WAL")
        bare.execute("PRAGMA synchronous = FULL")
        bare.execute("CREATE TABLE items (id INTEGER PRIMARY KEY, key TEXT, vector BLOB)")
        for size, first, stop in ((BATCH_ROWS, 0, rows), (1, rows, people.rows)):
            wall = cpu = bare_wall = 0.0
            bare_rows = 0
            every = max(1, (stop - first) // size // 100)
            for number, start in enumerate(range(first, stop, size)):
                end = min(start + size, stop)
                items, vectors = people.items(start, end), people.vectors(start, end)
                began, cpu_began = time.perf_counter(), time.process_time()
                gallery.add(items, vectors)
                wall += time.perf_counter() - began
                cpu += time.process_time() - cpu_began
                if number % every == 0:
                    began = time.perf_counter()
                    _commit(bare, items, vectors)
                    bare_wall += time.perf_counter() - began
                    bare_rows += end - start
            yield {
                "rows_per_commit": size,
                "rows": stop - first,
                "seconds": wall,
                "cpu_us_per_row": 1e6 * cpu / (stop - first),
                "rows_per_s": (stop - first) / wall,
                "bare_rows_per_s": bare_rows / bare_wall,
            }


def _commit(bare: sqlite3.Connection, items: list[Item], vectors: Rows) -> None:
    """Commit keys and vectors alone, in float16, into a table of nothing else."""
    stored = vectors.astype("<f2")
    bare.execute("BEGIN IMMEDIATE")
    bare.executemany(
        "INSERT INTO items (key, vector) VALUES (?, ?)",
        [(item.key, row.tobytes()) for item, row in zip(items, stored, strict=True)],
    )
    bare.execute("COMMIT")


def bare_faiss(gallery: Gallery) -> tuple[str, Callable[[Rows], object]]:
    """Return faiss called directly: a name, and a search that gives ids and scores only.

    It has the gallery's own index, read from its file, which begins as faiss writes it. A gallery
    that is too small for faiss is compared with an exact index made for this.
    """
    faiss = _faiss()
    folder = Path(gallery.location)
    if parts := [
        faiss.read_index(str(file)) for file in sorted(folder.glob("gallery.index-[0-9a-f]*"))
    ]:
        return (
            "faiss IVF-RaBitQ alone",
            lambda queries: [part.search(queries, CANDIDATES) for part in parts],
        )
    if (file := folder / "gallery.index").exists():
        index = faiss.read_index(str(file))
    else:
        index = faiss.IndexScalarQuantizer(
            gallery.embed_dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        for _, vectors in gallery.vectors():
            index.add(vectors)
    return "faiss flat fp16 alone", lambda queries: index.search(queries, K)


def _faiss() -> Any:
    return import_module("faiss")  # Its type hints are incomplete.


def _searches(
    gallery: Gallery, name: str, bare: Callable[[Rows], object], queries: Rows, seconds: float
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Time one query at a time and many at a time; ``ratio`` is the time over bare faiss's."""
    numbers = cycle(range(len(queries)))

    def one() -> Rows:
        number = next(numbers)
        return queries[number : number + 1]

    camera, half = Filter(camera="camera-7"), Filter(since=1_700_000_000.0 + gallery.count() // 2)
    single: dict[str, Callable[[], object]] = {
        "gallery": lambda: gallery.search(one(), K),
        "gallery, one camera (1 %)": lambda: gallery.search(one(), K, camera),
        name: lambda: bare(one()),
        "gallery, newer half": lambda: gallery.search(one(), K, half),
        "gallery, by track": lambda: gallery.search(one(), K, by_track=True),
    }
    some = queries[:BATCH_QUERIES]
    batch: dict[str, Callable[[], object]] = {
        "gallery": lambda: gallery.search(some, K),
        name: lambda: bare(some),
    }
    ones, many = (
        timed_rows(
            time_in_turns(runs, warmup=WARMUP, rounds=rounds, seconds=seconds * len(runs)),
            name,
            items,
        )
        for runs, rounds, items in ((single, 10, 1), (batch, 3, BATCH_QUERIES))
    )
    for row in (*ones.values(), *many.values()):
        row["ratio"] = 1 / row["speedup"]
        del row["seconds"], row["cpu_seconds"]  # Thousands of them.
    return ones, many


def _recall(gallery: Gallery, queries: Rows) -> float:
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


def _facts(result: dict[str, Any]) -> list[str]:
    index, start, peak = result["index"], result["start"], result["start"]["peak_rss_bytes"]
    kind = "exact" if index is None else index["kind"]
    facts = "" if index is None else "".join(f", {k} {v}" for k, v in index["parameters"].items())
    return [
        f"{result['rows']} x {result['dim']}, top {K}; {WARMUP} warm-up searches, then in turns "
        f"for {result['seconds']:g} s each; ratios are times over those of bare faiss",
        f"index {kind}{facts}: made in {result['build_s']:.1f} s; recall@{K} "
        f"{result['recall_at_10']:.4f} against sorting everything",
        f"fresh process: open {start['open_s']:.3f} s, first search {start['first_search_s']:.2f} "
        f"s, peak memory {'not measured' if peak is None else f'{peak / 1e6:.0f} MB'}; "
        f"{result['size_bytes'] / 1e6:.0f} MB on disk",
    ]


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.gallery")

"""A gallery of up to ten million pictures, as twenty cameras fill it in a month.

The folder is kept: a second call goes on with what is there.
"""

import json
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.flash import written_bytes
from benchmarks.month_data import CROPS, START_S, DemoFolder, Month
from benchmarks.month_searches import K, month_searches, query_each_second
from benchmarks.report import Column, conditions, print_report, table
from upperson_bench.processes import call_in_fresh_process
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug
from upperson_rt.cli.output import print_note
from upperson_rt.gallery import Gallery
from upperson_rt.search.features import CANDIDATES
from upperson_rt.search.service import CERTAIN

app = new_app("A gallery of a month of cameras.")
_FINGERPRINT = "sha256:" + 64 * "a"  # Of no model.
_BATCH = 4096
_QUERIES = 100
_NEAREST = CROPS * K
"""So many best pictures hold the ten best tracks."""
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_DAY_S = 86_400.0
_QUIET_S = 120.0
_FILL = "fill.jsonl"
_OF_FILLING = ("added", "insert_s", "inserted_bytes", "index_s", "index_written_bytes")
_STEPS = (100_000, 300_000, *range(1_000_000, 100_000_000, 1_000_000))
"""Pictures at which a gallery that is filled is measured."""
FILL = {
    "rows/s": Column("rows_s", "{:.0f}"),
    "written B/row": Column("written", "{:.0f}"),
    "index s": Column("index_s", "{:.0f}"),
    "index written B/row": Column("index_written", "{:.0f}"),
    "database B/row": Column("database", "{:.0f}"),
    "index B/row": Column("index", "{:.0f}"),
    "resident MB": Column("rss_mb", "{:.0f}"),
    "first answer s": Column("first_answer_s", "{:.1f}"),
    "p50 ms": Column("p50_ms", "{:.1f}"),
    "p95 ms": Column("p95_ms", "{:.1f}"),
}
FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "0.1 %: a camera, one day": {"camera": "camera-3", "since": 20, "until": 21},
    "1 %: a camera, ten days": {"camera": "camera-3", "since": 20, "until": 30},
    "10 %: all cameras, five days": {"since": 20, "until": 25},
    "10 %: two cameras": {"camera": ["camera-3", "camera-8"]},
    "an hour of a camera": {"camera": "camera-3", "since": 20.5, "until": 20.5 + 1 / 24},
    "by track": {"by_track": True},
    "with a verdict": {"k": CANDIDATES, "certain": CERTAIN},
    "with a verdict, by track": {"k": CANDIDATES, "certain": CERTAIN, "by_track": True},
}
"""By name; times in days. The shares are those of ten million pictures, of 50 days. With a verdict
a search looks at 200 candidates, and is as sure of the best 50 as another of the best ten."""
LIVE = {
    "number": Column("count", "{:.0f}"),
    "p50 ms": Column("p50_ms", "{:.1f}"),
    "p95 ms": Column("p95_ms", "{:.1f}"),
    "p99 ms": Column("p99_ms", "{:.1f}"),
    "longest ms": Column("longest_ms", "{:.0f}"),
}
TIMES = {
    "first p50 ms": Column("first_p50_ms", "{:.0f}"),
    "first p95 ms": Column("first_p95_ms", "{:.0f}"),
    "p50 ms": Column("p50_ms", "{:.1f}"),
    "p95 ms": Column("p95_ms", "{:.1f}"),
}
"""Of queries for the first time, when the disk is read, and again."""


@app.command(cls=Command)
def month(
    folder: Annotated[Path, typer.Option("--folder", help="The gallery's; filled where it lacks.")],
    demo: DemoFolder = Path("demo"),
    rows: Annotated[int, typer.Option("--rows", min=1000, help="Pictures.")] = 10_000_000,
    searches: Annotated[int, typer.Option("--searches", min=0, help="To see memory.")] = 10_000,
    minutes: Annotated[
        float, typer.Option("--minutes", min=0, help="Of adding 100 pictures a second meanwhile.")
    ] = 0,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="PNG file of the figures while it was filled.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Fill a gallery with drawn pictures of 512 dimensions, and time opening and searching it.

    Pictures and sentences lie as those of the demo. A process that is started for it searches on
    one thread. Recall is against all stored vectors.

    Example: `python -m benchmarks.month --folder month --rows 1000000`
    """
    drawn = Month(demo)
    result = conditions("month", "faiss-cpu", threads=1, batch_size=1, warmup=0)
    result |= {"rows": rows, "dim": drawn.dim} | fill(drawn, folder, rows)
    kinds = {"sentences": drawn.queries(_QUERIES, rows), "pictures": drawn.pictures(_QUERIES, rows)}
    filters = {name: _in_seconds(options) for name, options in FILTERS.items()}
    for name, queries in kinds.items():
        print_note(f"searching with {name}")
        np.save(folder / "queries.npy", queries)
        result[name] = call_in_fresh_process(
            month_searches,
            str(folder),
            str(folder / "queries.npy"),
            filters,
            searches,
            environment=_ONE_THREAD,
        )
    print_note("comparing with all stored vectors")
    compared = _recall(folder, np.concatenate([*kinds.values()]), list(kinds))
    result["recall"], result["recall_by_track"] = compared
    shown = [table("pictures", _fill_table(result["fill"]), FILL)]
    shown += [table(name, result[name]["searches"], TIMES) for name in kinds]
    if minutes:
        print_note(f"adding and searching for {minutes:g} minutes")
        result["live"] = _live(drawn, folder, 60 * minutes)
        shown.append(table("beside each other", result["live"], LIVE))
    (folder / "queries.npy").unlink()
    if plot is not None:
        _plot(result["fill"], plot)
    print_report(result, _facts(result), shown)


def _in_seconds(options: dict[str, Any]) -> dict[str, Any]:
    for name in {"since", "until"} & options.keys():
        options = {**options, name: START_S + _DAY_S * options[name]}
    return options


def fill(drawn: Month, folder: Path, rows: int) -> dict[str, Any]:
    """Add the pictures that are not there yet, and make the index, in steps that are measured."""
    with Gallery.open(folder, _FINGERPRINT, drawn.dim, create=True) as gallery:
        there = gallery.count()
    np.save(folder / "queries.npy", drawn.queries(_QUERIES, rows))
    kept = folder / _FILL
    steps = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    by_rows = {step["rows"]: step for step in steps}
    for stop in sorted({step for step in _STEPS if there < step < rows} | {max(rows, there)}):
        step = _step(drawn, folder, stop)
        if not step["added"] and stop in by_rows:  # Searches are measured again.
            step |= {name: by_rows[stop][name] for name in _OF_FILLING}
        by_rows[stop] = step
        kept.write_text("".join(f"{json.dumps(by_rows[key])}\n" for key in sorted(by_rows)))
    with Gallery.open(folder) as gallery:
        info = gallery.info()
    return {
        "fill": [by_rows[key] for key in sorted(by_rows)],
        "index": None if info.index is None else asdict(info.index),
    }


def _step(drawn: Month, folder: Path, rows: int) -> dict[str, Any]:
    """Add pictures until there are so many; return what that, the index, and searches took."""
    with Gallery.open(folder) as gallery:
        there, spent, written = gallery.count(), 0.0, written_bytes()
        for start in range(there, rows, _BATCH):
            stop = min(start + _BATCH, rows)
            items, vectors = drawn.items(start, stop), drawn.vectors(start, stop)
            began = time.perf_counter()
            gallery.add(items, vectors)
            spent += time.perf_counter() - began
    inserted = written_bytes() - written
    print_note(f"{rows} pictures; making the index of what is new")
    with Gallery.open(folder) as gallery:
        began = time.perf_counter()
        gallery.search(drawn.queries(1, rows), K)
        index_s = time.perf_counter() - began
    # Rows come so fast that checks and work on the index, which read beside, kept a long log.
    with closing(sqlite3.connect(folder / "gallery.sqlite")) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    found = call_in_fresh_process(
        month_searches,
        str(folder),
        str(folder / "queries.npy"),
        {"none": {}},
        0,
        environment=_ONE_THREAD,
    )
    return {
        "rows": rows,
        "added": rows - there,
        "insert_s": spent,
        "inserted_bytes": inserted,
        "index_s": index_s,
        "index_written_bytes": written_bytes() - written - inserted,
        "database_bytes": (folder / "gallery.sqlite").stat().st_size,
        "index_bytes": sum(file.stat().st_size for file in folder.glob("gallery.index*")),
        "first_answer_s": found["first_answer_s"],
        "rss_bytes": found["rss_bytes"],
        **found["searches"]["none"],
    }


def _live(drawn: Month, folder: Path, seconds: float) -> dict[str, Any]:
    """Add ten pictures ten times a second while another process searches once a second.

    The check of a gallery that was not closed in order is over before.
    """
    queries, commits = str(folder / "queries.npy"), list[float]()
    task = partial(
        call_in_fresh_process,
        query_each_second,
        str(folder),
        queries,
        environment=_ONE_THREAD,
    )
    with ThreadPoolExecutor(1) as pool, Gallery.open(folder) as gallery:
        start = gallery.count()
        gallery.add(drawn.items(start, start + 10), drawn.vectors(start, start + 10))
        for thread in threading.enumerate():
            if thread.name == "gallery-check":  # Once in the life of a process.
                thread.join()
        start += 10
        quiet = task(min(_QUIET_S, seconds))
        searching, began = pool.submit(task, seconds), time.monotonic()
        while (now := time.monotonic() - began) < seconds:
            items, vectors = drawn.items(start, start + 10), drawn.vectors(start, start + 10)
            before = time.monotonic()
            gallery.add(items, vectors)
            commits.append(time.monotonic() - before)
            start += 10
            time.sleep(max(0.0, now + 0.1 - (time.monotonic() - began)))
        beside = searching.result()
    return {
        name: {
            "count": len(times),
            **{f"p{p}_ms": 1e3 * float(np.percentile(times, p)) for p in (50, 95, 99)},
            "longest_ms": 1e3 * max(times),
        }
        for name, times in {
            "searches alone": [took for _, took in quiet],
            "searches beside": [took for _, took in beside],
            "commits of ten": commits,
        }.items()
    }


def _recall(
    folder: Path, queries: NDArray[np.float32], names: list[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the share of the ten best of all stored vectors that searches find, by kind.

    And the same of the ten best tracks.
    """
    best = np.full((len(queries), _NEAREST), -np.inf, np.float32)
    ids = np.full((len(queries), _NEAREST), -1, np.int64)
    with closing(sqlite3.connect(folder / "gallery.sqlite")) as database:
        stored = database.execute("SELECT id, vector FROM items NOT INDEXED ORDER BY id")
        while part := stored.fetchmany(8192):
            flat = np.frombuffer(b"".join(vector for _, vector in part), "<f2")
            scores = queries @ flat.reshape(len(part), -1).astype(np.float32).T
            scores = np.concatenate([best, scores], axis=1)
            numbers = np.broadcast_to([id_ for id_, _ in part], (len(queries), len(part)))
            every = np.concatenate([ids, numbers], axis=1)
            top = np.argpartition(scores, scores.shape[1] - _NEAREST, axis=1)[:, -_NEAREST:]
            best, ids = np.take_along_axis(scores, top, 1), np.take_along_axis(every, top, 1)
        ids = np.take_along_axis(ids, np.argsort(-best, axis=1), 1)
        chosen = "SELECT id, track FROM items WHERE id IN (SELECT value FROM json_each(?))"
        track_of = dict(database.execute(chosen, (json.dumps(np.unique(ids).tolist()),)))
    right = [row[:K] for row in ids.tolist()]
    tracks = [[*dict.fromkeys(track_of.get(id_) for id_ in row)][:K] for row in ids.tolist()]
    with Gallery.open(folder) as gallery:
        hits = [gallery.search(query[None], K)[0] for query in queries]
        of_tracks = [gallery.search(query[None], K, by_track=True)[0] for query in queries]
    found = [[hit.id for hit in row] for row in hits]
    found_tracks = [[hit.item.track for hit in row] for row in of_tracks]
    return _shares(found, right, names), _shares(found_tracks, tracks, names)


def _shares(found: list[list[Any]], right: list[list[Any]], names: list[str]) -> dict[str, float]:
    shares = [len({*one} & {*other}) / K for one, other in zip(found, right, strict=True)]
    parts = np.split(np.array(shares), len(names))
    return {name: float(np.mean(part)) for name, part in zip(names, parts, strict=True)}


def _fill_table(steps: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        f"{step['rows'] / 1e6:g} M": {
            **step,
            "rows_s": step["added"] / step["insert_s"] if step["added"] else None,
            "written": step["inserted_bytes"] / step["added"] if step["added"] else None,
            "index_written": step["index_written_bytes"] / step["added"] if step["added"] else None,
            "database": step["database_bytes"] / step["rows"],
            "index": step["index_bytes"] / step["rows"],
            "rss_mb": step["rss_bytes"] / 1e6,
        }
        for step in steps
    }


def _plot(steps: list[dict[str, Any]], plot: Path) -> None:
    """Draw memory, times of searches, and written bytes over the pictures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    memory, times, written = figure.subplots(1, 3)
    millions = np.array([step["rows"] for step in steps]) / 1e6

    def values(name: str) -> NDArray[np.float64]:
        return np.array([step[name] for step in steps], np.float64)

    memory.plot(millions, values("rss_bytes") / 1e9, "o-", label="resident, searching")
    memory.plot(millions, values("index_bytes") / 1e9, "o-", label="index on disk")
    memory.set_ylabel("GB")
    for name, label in (("p50_ms", "median"), ("p95_ms", "95th percentile")):
        times.plot(millions, values(name), "o-", label=f"again, {label}")
    times.plot(millions, values("first_p50_ms"), "o:", label="first time, median")
    times.set_ylabel("ms a sentence")
    added = np.maximum(values("added"), 1)
    for name, label in (("inserted_bytes", "rows"), ("index_written_bytes", "index")):
        written.plot(millions, values(name) / added, "o-", label=label)
    written.set_ylabel("bytes written a row added")
    for axes in (memory, times, written):
        axes.set_xlabel("million pictures of 512 dimensions")
        axes.set_ylim(bottom=0)
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(plot, dpi=110)


def _facts(result: dict[str, Any]) -> list[str]:
    last = result["fill"][-1]
    facts = [
        f"{result['rows']} x {result['dim']}, {last['database_bytes'] / 1e9:.1f} GB of database",
        f"index {json.dumps(result['index'])}: {last['index_bytes'] / 1e9:.2f} GB",
    ]
    for name, recall in result["recall"].items():
        found, tracks = result[name], result["recall_by_track"][name]
        facts.append(
            f"{name}: recall@{K} {recall:.4f}, by track {tracks:.4f}; first answer after "
            f"{found['first_answer_s']:.2f} s; resident {found['rss_bytes'] / 1e6:.0f} MB, at the "
            f"end {found['rss_at_end_bytes'] / 1e6:.0f} MB"
        )
    return facts


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.month")

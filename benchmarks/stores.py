"""A gallery beside other stores of vectors: the same drawn rows, queries and filter for each.

The folder keeps the rows and what was measured: a second call goes on with what is missing.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.month_data import DemoFolder, Month
from benchmarks.report import Column, conditions, print_report, table
from benchmarks.store_contenders import (
    BLOCK,
    COMMIT,
    KILLED_ROWS,
    STORES,
    K,
    Rows,
    Where,
    ask,
    count,
    fill,
    read_vectors,
)
from upperson_bench.processes import call_in_fresh_process, child_environment
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug
from upperson_rt.cli.output import print_note
from upperson_rt.errors import BackendError, UsageError
from upperson_rt.files import bytes_on_disk
from upperson_rt.machine import version_of

app = new_app("A gallery beside other stores of vectors.")
_QUERIES = 50
_KILLS = 3
_KILLED_COMMITS = 40
FILLING = {
    "rows/s": Column("rows_per_s", "{:.0f}"),
    "CPU us/row": Column("cpu_us_per_row", "{:.0f}"),
    "index s": Column("build_s", "{:.0f}"),
    "index CPU s": Column("build_cpu_s", "{:.1f}"),
    "peak MB": Column("peak_bytes", "{:.0f}", 1e-6),
    "disk MB": Column("disk_bytes", "{:.0f}", 1e-6),
    "acknowledged": Column("acknowledged", "{:.0f}"),
    "lost": Column("lost", "{:.0f}"),
    "load": Column("load", "{:.1f}"),
}
"""Acknowledged and lost are rows of processes that were killed."""
SEARCHING = {
    "first answer s": Column("first_answer_s"),
    "MB": Column("rss_bytes", "{:.0f}", 1e-6),
    "p50 ms": Column("p50_ms", "{:.1f}"),
    "p95 ms": Column("p95_ms", "{:.1f}"),
    "CPU ms": Column("cpu_ms", "{:.1f}"),
    "recall": Column("recall", "{:.3f}"),
    "1 %: p50 ms": Column("filter_p50_ms", "{:.1f}"),
    "1 %: CPU ms": Column("filter_cpu_ms", "{:.1f}"),
    "1 %: recall": Column("filter_recall", "{:.3f}"),
}


@app.command(cls=Command)
def stores(
    folder: Annotated[Path, typer.Option("--folder", help="Where all is made and kept.")],
    demo: DemoFolder = Path("demo"),
    rows: Annotated[int, typer.Option("--rows", min=BLOCK, help="Pictures.")] = 1_000_000,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="A store.", show_default="all")
    ] = None,
    debug: Debug = False,
) -> None:
    """Fill each store in commits of 256, search it in a fresh process, and kill it while it fills.

    Rows lie as the demo's pictures and have 512 dimensions; queries are its sentences. Searches run
    on one processor. Processor time and memory are also those of a server. A store whose libraries
    are not installed is skipped. Results of earlier calls are shown again.

    Example: `python -m benchmarks.stores --folder stores --rows 50000 --only ours`
    """
    if unknown := set(only or ()) - STORES.keys():
        expected = ", ".join(STORES)
        raise UsageError(f"expected --only one of {expected}; found {', '.join(unknown)}")
    work = folder.resolve() / str(rows)  # Milvus runs elsewhere.
    if not (work / "plan.json").exists():
        print_note(f"drawing {rows} rows")
        draw(Month(demo), work, rows)
    found = dict[str, dict[str, Any]]()
    for name, store in STORES.items():
        file = work / f"{name}.json"
        if not file.exists() and (only is None or name in only):
            if missing := [package for package in store.packages if version_of(package) is None]:
                print_note(f"{name} is skipped: not installed: {', '.join(missing)}")
                continue
            file.write_text(json.dumps(measure(work / f"{name}.store", rows)))
        if file.exists():
            found[name] = json.loads(file.read_text())
    packages = sorted({package for name in found for package in STORES[name].packages})
    result = conditions("stores", *packages, threads=1, batch_size=1, warmup=1)
    result |= {"rows": rows, "queries": _QUERIES, "k": K, "stores": found}
    print_report(
        result,
        [f"{name}: {STORES[name].kind}. Insert: {STORES[name].durable}" for name in found]
        + [f"{name}: {one['error']}" for name, one in found.items() if "error" in one],
        [table("filling", found, FILLING), table("searching", found, SEARCHING)],
    )


def draw(drawn: Month, work: Path, rows: int) -> None:
    """Write vectors, cameras, times, queries, a filter that 1 % pass, and the exact answers."""
    work.mkdir(parents=True, exist_ok=True)
    columns = np.empty(rows, [("times", float), ("cameras", "U16")])
    with (work / "vectors.f16").open("wb") as file:
        for start in range(0, rows, BLOCK):
            stop = min(start + BLOCK, rows)
            drawn.vectors(start, stop).astype("<f2").tofile(file)
            columns[start:stop] = [(item.time, item.camera) for item in drawn.items(start, stop)]
    times, cameras = columns["times"], columns["cameras"]
    np.savez(work / "columns.npz", times=times, cameras=cameras)
    where = Where("camera-3", float(times[int(0.4 * rows)]), float(times[int(0.6 * rows)]))
    passing = (cameras == where.camera) & (times >= where.since) & (times < where.until)
    queries = drawn.queries(_QUERIES, rows)
    np.save(work / "queries.npy", queries)
    plan = {"dim": drawn.dim, "where": where, "share": float(passing.mean())}
    plan["best"] = _exact(work, queries, np.ones(rows, bool))
    plan["filter_best"] = _exact(work, queries, passing)
    (work / "plan.json").write_text(json.dumps(plan))


def _exact(work: Path, queries: Rows, passing: NDArray[np.bool_]) -> list[list[int]]:
    scores = np.full((len(queries), len(passing)), -np.inf, np.float32)
    for start in range(0, len(passing), BLOCK):
        here = np.flatnonzero(passing[start : start + BLOCK])
        part = read_vectors(work, queries.shape[1], start, min(start + BLOCK, len(passing)))
        scores[:, start + here] = queries @ part[here].T
    best: list[list[int]] = np.argpartition(-scores, K - 1, axis=1)[:, :K].tolist()
    return best


def measure(place: Path, rows: int) -> Mapping[str, Any]:
    """Fill, search and kill a store in a folder that is named like it; return plain values."""
    found: dict[str, Any] = {"load": os.getloadavg()[0]}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "2")
    one_thread = dict.fromkeys(threads, "1")
    try:
        for task, environment in (fill, threads), (ask, one_thread):
            print_note(f"{place.stem}: {task.__name__}")
            if task is fill:
                _empty(place)
            found |= call_in_fresh_process(task, str(place), rows, environment=environment)
            files = [file for file in place.rglob("*") if file.is_file()]
            found["disk_bytes"] = sum(bytes_on_disk(file.stat()) for file in files)
        print_note(f"{place.stem}: kill")
        found |= kill(place)
    except BackendError as error:
        found["error"] = str(error)
    shutil.rmtree(place, ignore_errors=True)
    return found


def _empty(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()


def kill(place: Path) -> dict[str, int]:
    """Kill processes while they add rows to a store with an index, and count what is left.

    BackendError if it does not open then, or does not find the newest acknowledged row.
    """
    _empty(place)
    call_in_fresh_process(fill, str(place), KILLED_ROWS)
    there, start, acknowledged, lost = KILLED_ROWS, KILLED_ROWS, 0, 0
    for _ in range(_KILLS):
        command = [sys.executable, "-m", "benchmarks.store_contenders", str(place), str(start)]
        printed, stop = subprocess.PIPE, start
        with subprocess.Popen(command, env=child_environment(), stdout=printed) as process:
            assert process.stdout is not None
            for line in process.stdout:
                stop = int(line)
                if stop >= start + _KILLED_COMMITS * COMMIT:
                    process.kill()
        if stop == start:
            raise BackendError(f"{place.stem} added nothing before its process ended")
        counted, found = call_in_fresh_process(count, str(place), stop - 1)
        missing = max(0, there + stop - start - counted)
        if not missing and not found:
            raise BackendError(f"row {stop - 1} was acknowledged and is not found")
        acknowledged, lost = acknowledged + stop - start, lost + missing
        there, start = counted, stop + COMMIT  # What was not acknowledged may be there, too.
    return {"acknowledged": acknowledged, "lost": lost}


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.stores")

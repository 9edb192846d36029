"""`upperson-rt bench gallery`."""

from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from upperson_rt.cli.options import Debug, Json, Threads
from upperson_rt.cli.output import new_table, print_json, print_note, print_table

__all__ = ["gallery"]


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
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time adding to and searching in a gallery of synthetic people, against faiss alone.

    The pictures are clustered as crops of people are, and queries are as far from them as
    sentences. Search times of the gallery include fetching the metadata; contenders run in turns.
    Memory and start are those of a fresh process. Set OMP_NUM_THREADS as well to fix numpy's
    threads.

    Example: `upperson-rt bench gallery --rows 100000 --threads 1`
    """
    from importlib.metadata import version

    from upperson_rt.bench.gallery import K, bench_gallery
    from upperson_rt.machine import describe_machine

    machine = describe_machine()
    found = bench_gallery(
        rows, dim, threads=threads, seconds=seconds, folder=folder, progress=print_note
    )
    result = {
        "benchmark": "gallery",
        "machine": machine,
        "faiss": version("faiss-cpu"),
        "threads": threads,
        "seconds": seconds,
        "k": K,
        **found.as_dict(),
    }
    if json:
        print_json(result)
    else:
        _print_result(result)


def _print_result(result: dict[str, Any]) -> None:
    machine, index = result["machine"], result["index"]
    typer.echo(
        f"{machine['cpu']}, {result['threads'] or 'default'} threads, "
        f"{machine['cpus_available']} CPUs, load {machine['load_average']:.1f}; "
        f"faiss {result['faiss']}; {result['rows']} x {result['dim']}, top {result['k']}"
    )
    speeds = ("rows/s", "CPU us/row", "bare SQLite rows/s")
    table = new_table("adding", *speeds, right=speeds)
    for one in result["insertions"]:
        table.add_row(
            f"{one['rows_per_commit']} rows a commit",
            f"{one['rows_per_s']:.0f}",
            f"{1e6 * one['cpu_seconds'] / one['rows']:.0f}",
            f"{one['bare_rows_per_s']:.0f}",
        )
    print_table(table)
    typer.echo("")
    figures = ("p50 ms", "p90 ms", "p99 ms", "CPU ms", "ratio")
    table = new_table("one query", *figures, right=figures)
    for name, timing in result["single"].items():
        values = (f"{timing[key]:.2f}" for key in ("p50_ms", "p90_ms", "p99_ms", "cpu_ms"))
        table.add_row(name, *values, f"{timing['ratio']:.2f}x")
    print_table(table)
    typer.echo("")
    rates = ("p50 ms", "p90 ms", "queries/s")
    table = new_table("32 queries", *rates, right=rates)
    for name, timing in result["batch"].items():
        table.add_row(
            name,
            f"{timing['p50_ms']:.2f}",
            f"{timing['p90_ms']:.2f}",
            f"{timing['items_per_s']:.0f}",
        )
    print_table(table)
    start = result["start"]
    peak = start["peak_rss_bytes"]
    kind = "exact" if index is None else index["kind"]
    facts = "" if index is None else "".join(f", {k} {v}" for k, v in index["parameters"].items())
    typer.echo("")
    typer.echo(
        f"index {kind}{facts}: made in {result['build_s']:.1f} s; recall@10 "
        f"{result['recall_at_10']:.4f} against sorting everything"
    )
    typer.echo(
        f"fresh process: open {start['open_s']:.3f} s, first search {start['first_search_s']:.2f} "
        f"s, peak memory {'not measured' if peak is None else f'{peak / 1e6:.0f} MB'}; "
        f"{result['size_bytes'] / 1e6:.0f} MB on disk"
    )
    typer.echo(dumps(result, separators=(",", ":")))

"""Retrieval metrics against sorting the gallery for every query: equal results, processor time.

Numpy's threads are decided when it is loaded, so each run is in a process of its own.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from benchmarks.ranking_runs import OURS, SORTED, measure
from upperson_rt.bench.processes import call_in_fresh_process
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug, Json
from upperson_rt.cli.output import new_table, print_result, print_table, show_progress
from upperson_rt.errors import IntegrityError
from upperson_rt.machine import describe_machine, machine_lines

app = new_app("Time retrieval metrics against sorting.")


@app.command(cls=Command)
def ranking(
    queries: Annotated[int, typer.Option(min=1, help="Sentences.")] = 20_000,
    images: Annotated[int, typer.Option(min=1, help="Pictures that each ranks.")] = 20_000,
    people: Annotated[int, typer.Option(min=1, help="Who they are of; at most --images.")] = 1000,
    dim: Annotated[int, typer.Option(min=1, help="Width of an embedding.")] = 512,
    threads: Annotated[int, typer.Option(min=1, help="Of numpy, beside a run with one.")] = 2,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time retrieval metrics of one direction against sorting the gallery for every query.

    Embeddings are random, around a centre for each person. Both compute all scores and must give
    equal metrics; what is timed is the call, not the making of embeddings.

    Example: `python -m benchmarks.ranking --threads 2`
    """
    size = (queries, images, min(people, images), dim)
    runs = [(SORTED, 1), *((OURS, count) for count in sorted({1, threads}))]
    found: list[dict[str, Any]] = []
    with show_progress() as progress:
        for number, (name, count) in enumerate(runs):
            progress("ranking, one after the other", number, len(runs))
            variables = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(count))
            measured = call_in_fresh_process(measure, name, *size, environment=variables)
            found.append({"name": name, "threads": count, **measured})
    require_equal(found)
    result = {
        "benchmark": "ranking",
        "machine": describe_machine("numpy"),
        **dict(zip(("queries", "images", "people", "dim"), size, strict=True)),
        "runs": [
            run | {"cpu_speedup": found[0]["cpu_ms"] / max(run["cpu_ms"], 0.001)} for run in found
        ],
    }
    print_result(result, as_json, _show)


def require_equal(runs: Sequence[dict[str, Any]]) -> None:
    """Raise IntegrityError if metrics differ by more than rounding of scores may exchange."""
    expected = runs[0]["metrics"]
    for run in runs[1:]:
        apart = max(abs(run["metrics"][name] - value) for name, value in expected.items())
        if not apart <= 0.01:
            raise IntegrityError(
                f"'{run['name']}' measures otherwise than '{runs[0]['name']}': expected "
                f"{expected}, found {run['metrics']}; please report this with the version of numpy"
            )


def _show(result: dict[str, Any]) -> None:
    typer.echo(
        f"{result['queries']:,} queries, {result['images']:,} pictures of {result['people']:,} "
        f"people, {result['dim']} dimensions, once each"
    )
    typer.echo(machine_lines(result["machine"], None))
    columns = ("threads", "s", "CPU s", "CPU speed", "R@1", "mAP", "mINP")
    table = new_table("", *columns, right=columns)
    for run in result["runs"]:
        table.add_row(
            run["name"],
            str(run["threads"]),
            f"{run['p50_ms'] / 1000:.2f}",
            f"{run['cpu_ms'] / 1000:.2f}",
            f"{run['cpu_speedup']:.1f}x",
            *(f"{run['metrics'][name]:.3f}" for name in ("R@1", "mAP", "mINP")),
        )
    print_table(table)


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.ranking")

"""What every benchmark ends with: its conditions, its tables, and one line of JSON with all values.

``make bench NAME=towers | tail -n 1`` is that line.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import typer

from upperson_autotune.timing import Timing
from upperson_machine.description import describe_machine, machine_lines
from upperson_rt.cli.output import new_table, print_table


class Column(NamedTuple):
    """A value of every row, and how it is written."""

    key: str
    template: str = "{:.2f}"
    scale: float = 1.0


TIMES = {
    "p50 ms": Column("p50_ms"),
    "p90 ms": Column("p90_ms"),
    "p99 ms": Column("p99_ms"),
    "CPU ms": Column("cpu_ms"),
}
"""Percentiles by the clock, and the median processor time."""

SPEEDS = {"speed": Column("speedup", "{:.2f}x"), "CPU speed": Column("cpu_speedup", "{:.2f}x")}
"""Against the reference, by the clock and by processor time."""


class Table(NamedTuple):
    """What is printed, and written into a page, alike."""

    columns: Sequence[str]
    """The first one is the table's title."""
    rows: Sequence[Sequence[str]]


def table(
    title: str, rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Column]
) -> Table:
    """Return a table of rows by name; a value that is missing or None is an empty cell."""
    return Table(
        (title, *columns),
        [
            (name, *(_cell(row.get(column.key), column) for column in columns.values()))
            for name, row in rows.items()
        ],
    )


def timed_rows(
    timings: Mapping[str, Timing], reference: str, items: int = 1
) -> dict[str, dict[str, Any]]:
    """Return `Timing.as_dict` of every contender, its runs, and its speeds over the reference.

    Args:
        timings: By contender.
        reference: One of them.
        items: What a run works on.
    """
    base = timings[reference]
    return {
        name: timing.as_dict(items)
        | {
            "speedup": base.median_s / timing.median_s,
            # A short run may take no time that a coarse clock shows.
            "cpu_speedup": base.median_cpu_s / timing.median_cpu_s if timing.median_cpu_s else None,
            "seconds": timing.seconds,
            "cpu_seconds": timing.cpu_seconds,
        }
        for name, timing in timings.items()
    }


def conditions(
    benchmark: str, *packages: str, threads: int | None, batch_size: int, warmup: int
) -> dict[str, Any]:
    """Return the beginning of a result: what ran, on which machine, and how.

    Args:
        benchmark: Its name.
        packages: Whose versions matter.
        threads: None where the libraries choose.
        batch_size: Items of a run.
        warmup: Runs of each contender before those that are timed.
    """
    return {
        "benchmark": benchmark,
        "machine": describe_machine(*packages),
        "threads": threads,
        "batch_size": batch_size,
        "warmup": warmup,
    }


def print_report(result: Mapping[str, Any], facts: Iterable[str], tables: Iterable[Table]) -> None:
    """Print machine, facts and tables, then the whole result as the last line.

    Args:
        result: As `conditions` began it.
        facts: What else the tables were measured with, a line each.
        tables: The tables.
    """
    for line in (machine_lines(result["machine"], result["threads"]), *facts):
        typer.echo(line)
    for columns, rows in tables:
        shown = new_table(*columns, right=tuple(columns[1:]))
        for row in rows:
            shown.add_row(*row)
        typer.echo("")
        print_table(shown)
    typer.echo(json.dumps(result))  # In ASCII: the terminal's encoding may be any.


def _cell(value: float | None, column: Column) -> str:
    return "" if value is None else column.template.format(value * column.scale)

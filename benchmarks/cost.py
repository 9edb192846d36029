"""What a gallery of any size costs on boxes of one kind, from measurements at some sizes.

Each box has its part of the rows, and every query goes to all boxes. Memory and the time of a
query are lines through the measurements; intervals come from drawing their residuals anew.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.report import Column, conditions, print_report, table
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug
from upperson_rt.errors import InputError

_DRAWS = 2000
_FEWEST = 4
SIZES = (1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
COLUMNS = {
    "boxes": Column("boxes", "{:.0f}"),
    "at least": Column("boxes_low", "{:.0f}"),
    "at most": Column("boxes_high", "{:.0f}"),
    "GB of memory a box": Column("memory_gb", "{:.2f}"),
    "ms a query": Column("query_ms", "{:.0f}"),
    "cost a month": Column("cost", "{:.0f}"),
    "cost from": Column("cost_low", "{:.0f}"),
    "cost to": Column("cost_high", "{:.0f}"),
}

app = new_app("What galleries larger than a box would cost.")


class Box(NamedTuple):
    """One computer of the cluster."""

    memory_gb: float
    disk_gb: float
    cores: int
    price: float
    """A month, in any currency."""


@app.command(cls=Command)
def cost(
    measured: Annotated[
        Path,
        typer.Option("--measured", help="Lines of JSON with rows, rss_bytes, p50_ms and bytes."),
    ],
    memory: Annotated[float, typer.Option("--memory", min=0.1, help="GB that rows may use.")] = 2.5,
    disk: Annotated[float, typer.Option("--disk", min=1, help="GB of a box's disk.")] = 200,
    cores: Annotated[int, typer.Option("--cores", min=1, help="Of a box.")] = 2,
    price: Annotated[float, typer.Option("--price", min=0, help="Of a box, a month.")] = 20,
    queries: Annotated[float, typer.Option("--queries", min=0, help="A second, of all users.")] = 1,
    within: Annotated[
        float, typer.Option("--within", min=1, help="ms that a query may take.")
    ] = 50,
    debug: Debug = False,
) -> None:
    """Extrapolate memory, queries and money from what `benchmarks.month` measured while it filled.

    A box is full when its rows need the memory, the disk or the cores, or when a query takes too
    long. Prices are yours to set: the default is for the arithmetic alone.

    Example: `python -m benchmarks.cost --measured month/fill.jsonl --price 25`
    """
    steps = [json.loads(line) for line in measured.read_text("utf-8").splitlines()]
    steps = [step for step in steps if step["rows"] >= SIZES[0]]  # Where the index is of one kind.
    if len(steps) < _FEWEST:
        raise InputError(
            f"{measured} has {len(steps)} sizes of a million rows or more: measure {_FEWEST}",
            code="too_few_sizes",
        )
    rows = np.array([step["rows"] for step in steps], np.float64)
    lines = {
        name: _lines(rows, np.array([step[name] for step in steps], np.float64))
        for name in ("rss_bytes", "p50_ms", "database_bytes", "index_bytes")
    }
    box = Box(memory, disk, cores, price)
    found = {f"{size / 1e6:g} M": _boxes(lines, size, box, queries, within) for size in SIZES}
    result = conditions("cost", "faiss-cpu", threads=1, batch_size=1, warmup=0)
    result |= {"box": box._asdict(), "queries_a_second": queries, "sizes": found}
    facts = [
        f"{len(steps)} sizes from {rows.min() / 1e6:g} to {rows.max() / 1e6:g} million rows; 95 %",
        f"a box: {memory:g} GB for rows, {disk:g} GB of disk, {cores} cores, {price:g} a month",
    ]
    shown = {f"{name}, by {one['limit']}": one for name, one in found.items()}
    print_report(result, facts, [table("rows, limited", shown, COLUMNS)])


def _lines(rows: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (1 + draws, 2): slope and constant of the fit, and of fits with drawn residuals."""
    fit = np.polyfit(rows, values, 1)
    expected = np.polyval(fit, rows)
    # Residuals of a line through N points are too small by two degrees of freedom.
    residuals = (values - expected) * math.sqrt(len(rows) / (len(rows) - 2))
    rng = np.random.default_rng(1)
    drawn = expected + rng.choice(residuals, (_DRAWS, len(rows)))
    return np.vstack([fit, np.polyfit(rows, drawn.T, 1).T])


def _boxes(
    lines: dict[str, NDArray[np.float64]], rows: int, box: Box, queries: float, within: float
) -> dict[str, Any]:
    """Return how many boxes so many rows need, with an interval of 95 %, and what limits them."""

    def most(name: str, limit: float) -> NDArray[np.float64]:
        """Return how many rows a box can have until the line reaches a limit."""
        slope, constant = lines[name].T
        rows: NDArray[np.float64] = (limit - constant) / np.maximum(slope, 1e-12)
        return np.maximum(1.0, rows)

    limits = {
        "memory": most("rss_bytes", box.memory_gb * 1e9),
        "disk": 1 / (1 / most("database_bytes", box.disk_gb * 1e9)
                     + 1 / most("index_bytes", box.disk_gb * 1e9)),
        "time": most("p50_ms", within),
        "cores": most("p50_ms", 1e3 * box.cores / queries if queries else math.inf),
    }  # fmt: skip
    limit = min(limits, key=lambda name: limits[name][0])
    boxes = np.ceil(rows / np.minimum.reduce([*limits.values()]))
    low, high = np.percentile(boxes[1:], (2.5, 97.5))
    of_a_box = rows / boxes[0]
    return {
        "boxes": boxes[0],
        "boxes_low": low,
        "boxes_high": high,
        "limit": limit,
        "memory_gb": np.polyval(lines["rss_bytes"][0], of_a_box) / 1e9,
        "query_ms": np.polyval(lines["p50_ms"][0], of_a_box),
        "cost": boxes[0] * box.price,
        "cost_low": low * box.price,
        "cost_high": high * box.price,
    }


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.cost")

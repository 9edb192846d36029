"""The parity report for people, at most 100 columns wide."""

from itertools import groupby
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from upperson_rt.cli.output import new_table, print_note, print_table

if TYPE_CHECKING:
    from upperson_export.parity.report import ParityReport
    from upperson_export.parity.verdict import Judged
    from upperson_rt.agreement import Agreement

_WIDTHS = {
    "tower": 5, "batch": 5, "inputs": 9, "min cos": 8, "1 %": 8, "50 %": 8, "max error": 9,
    "alone": 7, "top-10": 6, "tau": 6, "": 7,
}  # fmt: skip


def print_report(report: "ParityReport") -> None:
    """Print a line about what was compared, and a table for each variant and backend.

    A row is the worst of all ways to fill batches of one size; ``--json`` has them all.
    """
    typer.echo(f"reference  {report.reference}, one item a batch")
    typer.echo(f"inputs     {report.source}; texts of {_lengths(report)} tokens")
    paths = report.pixel_paths
    verdict = "equal in training and runtime" if paths.are_equal else f"FAIL: {paths.message()}"
    typer.echo(f"pixels     {verdict}")
    for name, group in groupby(report.judged, key=_subject_name):
        judged = list(group)
        failing = sum(one.fault is not None for one in judged)
        verdict = f"{failing} of {len(judged)} comparisons FAIL" if failing else "ok"
        typer.echo(f"\n{name}: {verdict}, expected {_tolerance(judged[0])}")
        print_table(_table(judged, report.worst))
    for absent in report.not_run:
        print_note(f"not run: {absent.variant} on {absent.backend}: {absent.reason}")


def _table(judged: "list[Judged]", worst: "Judged | None") -> Table:
    table = new_table(*_WIDTHS, right=tuple(name for name in _WIDTHS if name not in ("tower", "")))
    for column in table.columns:
        column.min_width = _WIDTHS[str(column.header)]
    for (tower, batch), group in groupby(judged, key=_row_key):
        row = max(group, key=lambda one: one.badness)
        found, ranking = row.comparison, row.comparison.ranking
        mark = "WORST" if row is worst else "fails" if row.fault else ""
        table.add_row(
            tower,
            str(batch),
            found.inputs,
            *_cosines_and_error(found.to_reference),
            "" if found.to_alone is None else f"{found.to_alone.max_error:.0e}",
            "" if ranking is None else f"{ranking.mean_overlap:.3f}",
            "" if ranking is None else f"{ranking.mean_tau:.3f}",
            mark,
        )
    return table


def _cosines_and_error(found: "Agreement | None") -> list[str]:
    if found is None:
        return [""] * 4
    values = (found.min_cosine, found.p1_cosine, found.median_cosine)
    return [*(f"{value:.6f}" for value in values), f"{found.max_error:.1e}"]


def _subject_name(judged: "Judged") -> str:
    return f"{judged.comparison.variant} on {judged.comparison.backend}"


def _row_key(judged: "Judged") -> tuple[str, int]:
    return judged.comparison.tower, judged.comparison.batch_size


def _lengths(report: "ParityReport") -> str:
    lengths = report.inputs.lengths
    return f"{lengths.min()} to {lengths.max()}"


def _tolerance(judged: "Judged") -> str:
    tolerance = judged.tolerance
    if tolerance.max_error is not None:
        return f"max error {tolerance.max_error:g}"
    return f"cosine {tolerance.min_cosine:g}"

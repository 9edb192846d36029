"""`upperson-rt log`."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from upperson_rt.cli.app import Command, new_app
from upperson_rt.cli.options import Debug, Json
from upperson_rt.cli.output import print_json, print_labelled, print_line
from upperson_rt.errors import IntegrityError, UsageError
from upperson_rt.printable import count_of, shown

__all__ = ["app"]

app = new_app("Look after query logs.")


@app.callback()
def options() -> None:
    """Look after query logs."""


@app.command(cls=Command)
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Query log.")],
    expect: Annotated[
        list[str] | None,
        typer.Option(
            "--expect",
            metavar="CHAIN",
            help="A chain that the log had, noted elsewhere: it must still have it; may be given "
            "again.",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Tell whether a line was changed, removed or added; exit code 6 if so.

    Whoever may write the log can make all of it anew. The last chain stands for the whole log: note
    it now and then where he cannot write, and pass it with --expect.

    Example: `upperson-rt log verify console/query.log`
    """
    from upperson_rt.log_chain import verify_log

    expected = [chain.strip().lower() for chain in expect or ()]
    for chain in expected:
        if not re.fullmatch("[0-9a-f]{64}", chain):
            raise UsageError(
                f"--expect takes a chain as  upperson-rt log verify  prints it, 64 digits, found "
                f"{shown(chain)}"
            )
    report = verify_log(file, expected)
    if as_json:
        print_json({"file": str(file), "ok": not report.problems, **asdict(report)})
    else:
        for problem in report.problems:
            print_labelled("wrong", typer.colors.RED, problem)
        if not report.problems:
            rest = (
                f", {report.unchained} of them of older releases, not chained"
                if report.unchained
                else ""
            )
            total = report.lines + report.unchained
            print_line(f"{count_of(total, 'line')} as they were written{rest}")
        if report.cut_off:
            print_line(f"{count_of(report.cut_off, 'line')} cut off by a full disk or a crash")
        for number in report.expected.values():
            print_line(f"the expected chain is that of line {number}: up to it nothing has changed")
        print_line(f"last chain: {report.chain or 'none'}")
    if report.problems:
        raise IntegrityError(f"{file} is not as it was written: {report.problems[0]}")

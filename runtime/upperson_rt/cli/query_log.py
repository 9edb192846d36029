"""`upperson-rt log`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from upperson_rt.cli.app import Command, new_app
from upperson_rt.cli.options import Debug, Json
from upperson_rt.cli.output import print_json, print_labelled, print_line
from upperson_rt.errors import IntegrityError
from upperson_rt.printable import count_of

__all__ = ["app"]

app = new_app("Look after query logs.")


@app.callback()
def options() -> None:
    """Look after query logs."""


@app.command(cls=Command)
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Query log.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Tell whether a line was changed, removed or added; exit code 6 if so.

    The last chain stands for the whole log: note it elsewhere now and then, and compare.

    Example: `upperson-rt log verify console/query.log`
    """
    from upperson_rt.log_chain import verify_log

    report = verify_log(file)
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
        print_line(f"last chain: {report.chain or 'none'}")
    if report.problems:
        raise IntegrityError(f"{file} is not as it was written: {report.problems[0]}")

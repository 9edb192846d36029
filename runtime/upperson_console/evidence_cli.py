"""`upperson-rt evidence`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from upperson_log.cli import TsaCert
from upperson_rt.cli.app import Command, new_app
from upperson_rt.cli.groups import grouped
from upperson_rt.cli.options import Output
from upperson_rt.cli.output import print_labelled, print_line, print_result
from upperson_rt.errors import IntegrityError

app = new_app("Verify evidence packages, the exports of the console.")


@app.callback()
def evidence() -> None:
    """Verify evidence packages, the exports of the console."""


@app.command(cls=Command)
@grouped
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Evidence package (zip).")],
    *,
    trust: Annotated[
        Path | None,
        typer.Option(
            "--trust", metavar="PUBKEY", help="Public key (PEM) that must have signed the package."
        ),
    ] = None,
    tsa_cert: TsaCert = None,
    log: Annotated[
        Path | None,
        typer.Option(
            "--log", metavar="FILE", help="Query log of the server: it must have this export."
        ),
    ] = None,
    output: Output,
) -> None:
    """Check that no file of a package was changed, removed or added; else the exit code is 6.

    With --trust that holds for every byte but a time stamp's, and for packages of earlier releases
    without dates and order. Without --trust only the hashes are checked, which an attacker can
    replace. With --tsa-cert the package must have been stamped by that authority. No network is
    used. Without the package cryptography, names and hashes are still checked; then the exit code
    is 5.

    Example: `upperson-rt evidence verify export.zip --trust site.pub`
    """
    from upperson_console.evidence_check import Package

    package = Package(file, trust, tsa_cert)
    line = None if log is None else package.find_in(log)
    result = {
        "file": str(file),
        "ok": not package.problems and package.unavailable is None,
        "sha256": package.sha256,
        "signature": package.signature,
        "signed_by": package.signed_by,
        "timestamp": {
            "state": package.stamp_state,
            **({} if package.stamp is None else asdict(package.stamp)),
        },
        "log_line": line,
        "facts": package.facts,
        "problems": [asdict(problem) for problem in package.problems],
    }

    def show(_: object) -> None:
        states = {
            "trusted": "signed by the trusted key",
            "not_checked": "signed, but not checked: name the key with --trust"
            if trust is None
            else "signed, but not checked: names and hashes of the files were checked",
            "none": "not signed: its hashes detect accidents, not attacks",
            "wrong": "not signed by the trusted key: nothing else was read",
        }
        if package.facts or package.signature != "none":  # Else it is no package.
            print_line(states[package.signature])
            if (stamp := package.stamp) is not None:
                print_line(f"existed at {stamp.time}, as stamped by {stamp.authority}")
            elif package.stamp_state == "not_checked" and tsa_cert is None:
                print_line("time stamp not checked: name its certificates with --tsa-cert")
            signed_by = {"signed_by": package.signed_by}
            facts = signed_by | package.facts | signed_by  # A manifest may claim another key.
            for name, value in facts.items():
                print_line(f"{name}: {value}")
        if line is not None:
            print_line(f"its export is line {line} of the query log")
        for one in package.problems:
            text = f"{one.path or 'the package'}: {one.text} ({one.code})"
            print_labelled("wrong", typer.colors.RED, text)

    print_result(result, output.as_json, show)
    if package.problems:
        first = package.problems[0]
        message = f"{file}: {first.path or 'the package'}: {first.text}"
        raise IntegrityError(message, code=first.code, path=file, member=first.path)
    if package.unavailable is not None:
        raise package.unavailable

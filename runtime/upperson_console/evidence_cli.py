"""`upperson-rt evidence`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upperson_rt.cli.app import Command, new_app
from upperson_rt.cli.groups import grouped
from upperson_rt.cli.options import Output
from upperson_rt.cli.output import print_labelled, print_line, print_result
from upperson_rt.errors import IntegrityError
from upperson_rt.printable import count_of

if TYPE_CHECKING:
    from upperson_console.evidence_check import Manifest, PackageReport

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
    log: Annotated[
        Path | None,
        typer.Option(
            "--log", metavar="FILE", help="Query log of the server: it must have this export."
        ),
    ] = None,
    output: Output,
) -> None:
    """Check that no file of a package was changed, removed or added; else the exit code is 6.

    Without --trust only the hashes are checked, which an attacker can replace. No network is used.

    Example: `upperson-rt evidence verify export.zip --trust site.pub`
    """
    from upperson_console.evidence_check import check_log, verify_package

    report, line = verify_package(file, trust), None
    problems = list(report.problems)
    if log is not None:
        line, more = check_log(report, log)
        problems += more
    result = {
        "file": str(file),
        "ok": not problems,
        **asdict(report),
        "problems": [asdict(problem) for problem in problems],
        "log_line": line,
    }
    print_result(result, output.as_json, lambda _: _print_report(report, line))
    if not output.as_json:
        for problem in problems:
            place = f"{problem.path}: " if problem.path else ""
            print_labelled("wrong", typer.colors.RED, f"{place}{problem.text} ({problem.code})")
    if problems:
        first = problems[0]
        message = f"{file}: {first.path or 'the package'}: {first.text}"
        raise IntegrityError(message, code=first.code, path=file, member=first.path)


def _print_report(report: "PackageReport", line: int | None) -> None:
    signer = f"sha256:{report.signed_by}"
    print_line(
        {
            "trusted": f"signed by the trusted key {signer}",
            "not_checked": f"signed by {signer}, which was not checked: name the key with --trust",
            "none": "not signed: its hashes detect accidents, not attacks",
            "wrong": "without a signature of the trusted key: nothing else was read",
        }[report.signature]
    )
    if report.manifest is not None:
        print_line(*_facts(report.manifest))
    if line is not None:
        print_line(f"its export is line {line} of the query log")


def _facts(manifest: "Manifest") -> list[str]:
    """Return who exported what, and when."""
    by, summary, query = manifest.exported_by, manifest.summary, manifest.query
    verdict = (query.get("verdict") or {}).get("text")
    contents = [
        count_of(summary.pictures, "picture"),
        count_of(summary.frames, "frame"),
        f"{count_of(summary.clips, 'clip')}{' (blurred)' if manifest.blurred else ''}",
        *([f"{len(summary.missing)} not kept"] if summary.missing else []),
    ]
    signer = manifest.model.get("signed_by")
    bundle = f"signed by {signer}" if signer else "not signed"
    return [
        f"exported {manifest.exported} by {by.get('user')} ({by.get('role')})",
        *(f"{name}: {text}" for name, text in manifest.about.items()),
        f"query: {query.get('sentence') or 'a picture, or none'}",
        *([f"verdict: {verdict}"] if verdict else []),
        f"contents: {', '.join(contents)}",
        f"model: {manifest.model.get('fingerprint')}, bundle {bundle}",
        f"query log before the export: chain {manifest.log.get('chain') or 'none'}",
    ]

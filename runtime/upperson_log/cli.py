"""The command line of the log: ``upperson-rt log``."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from upperson_rt.cli.app import Command, new_app
from upperson_rt.cli.groups import grouped
from upperson_rt.cli.options import Output
from upperson_rt.cli.output import print_labelled, print_line, print_result
from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.printable import count_of, safe_repr, visible_text

if TYPE_CHECKING:
    from upperson_log.chain import LogReport
    from upperson_log.timestamps import TimeStamp


TsaCert: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--tsa-cert",
        metavar="FILE",
        help="Certificates of the time-stamp authority, PEM: its root, and others of its chain.",
    ),
]

app = new_app("Verify query logs and logs of erasures, and acknowledge broken ones.")


@app.command(cls=Command)
@grouped
def verify(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="Query log, or the erasures.log of a gallery."),
    ],
    *,
    expect: Annotated[
        list[str] | None,
        typer.Option(
            "--expect",
            metavar="CHAIN",
            help="A chain that the log had, noted elsewhere: it must still have it; may be given "
            "again.",
        ),
    ] = None,
    timestamp: Annotated[
        list[Path] | None,
        typer.Option(
            "--timestamp",
            metavar="FILE",
            help="A stamp by  upperson-rt log timestamp, under its name: the log must have its "
            "chain; needs --tsa-cert; may be given again.",
        ),
    ] = None,
    tsa_cert: TsaCert = None,
    output: Output,
) -> None:
    """Check that no line was changed, removed or added; if one was, the exit code is 6.

    A file that is no such log, or has no chains, ends with 6, too.

    A user who can write the log can replace all of it. The last chain stands for the whole log:
    note it now and then where that user cannot write, and pass it with --expect.

    Example: `upperson-rt log verify console/query.log`

    Example: `upperson-rt log verify gallery/erasures.log`
    """
    from upperson_log.chain import verify_log

    expected = [chain.strip().lower() for chain in expect or ()]
    for chain in expected:
        if not re.fullmatch("[0-9a-f]{64}", chain):
            raise UsageError(
                f"--expect takes a chain as  upperson-rt log verify  prints it, 64 digits, found "
                f"{safe_repr(chain)}",
                code="chain_malformed",
                found=chain,
            )
    stamps = _read_stamps(timestamp or (), tsa_cert)
    report = verify_log(file, [*expected, *stamps])
    stamped = [asdict(one) | {"line": report.expected.get(chain)} for chain, one in stamps.items()]
    result = {"file": str(file), "ok": not report.problems, **asdict(report), "timestamps": stamped}

    def show(_: object) -> None:
        _print_report(report)
        for one in stamped:
            print_line("line {line} existed at {time}, as stamped by {authority}".format(**one))

    print_result(result, output.as_json, show)
    if report.problems:
        raise IntegrityError(f"{file}: {report.problems[0]}", code=report.code, path=file)


def _read_stamps(files: Sequence[Path], tsa_cert: Path | None) -> dict[str, "TimeStamp"]:
    """Return verified stamps by the chain that the name of each file has."""
    from upperson_log.timestamps import MOST_STAMP_BYTES, read_certificates, read_stamp
    from upperson_rt.files import read_bounded

    if tsa_cert is None or not files:
        if tsa_cert is not None or files:
            raise UsageError("--timestamp and --tsa-cert go together", code="tsa_cert_missing")
        return {}
    trusted = read_certificates(tsa_cert)
    chains = {file.stem.rpartition(".")[2]: read_bounded(file, MOST_STAMP_BYTES) for file in files}
    return {chain: read_stamp(one, chain.encode(), trusted) for chain, one in chains.items()}


def _print_report(report: "LogReport") -> None:
    for problem in report.problems:
        print_labelled("wrong", typer.colors.RED, problem)
    if not report.problems:
        rest = ""
        if report.unchained:
            rest = f", {report.unchained} of them of older releases, not chained"
        total = report.lines + report.unchained
        files = f" in {count_of(report.files, 'file')}" if report.files > 1 else ""
        print_line(f"{count_of(total, 'line')}{files} as they were written{rest}")
    for chain, is_known in report.absent.items():
        if is_known:
            print_line(f"not here, as acknowledged or expected: the file that ends with {chain}")
    if report.previous:
        print_line(f"it continues a broken log, whose last known chain is {report.previous}")
    if report.cut_off:
        print_line(f"{count_of(report.cut_off, 'line')} cut off by a full disk or a crash")
    for number in report.expected.values():
        print_line(f"the expected chain is that of line {number}: up to it nothing has changed")
    print_line(f"last chain: {report.chain or 'none'}")


@app.command(cls=Command)
@grouped
def acknowledge(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Query log.")],
    *,
    reason: Annotated[str, typer.Option("--reason", help="Why, for the log.")] = "",
    output: Output,
) -> None:
    """Acknowledge that a log was cut, changed or removed, or that you archived parts of it.

    The log gets a line with time, user and reason. Warnings end, and what was broken stays beside
    the log as FILE.broken-1. Of parts that are not here any more, the line has the last chains, and
    `log verify` accepts that they are missing. Run it as the user who writes the log.

    Example: `upperson-rt log acknowledge console/query.log --reason "disk was full"`
    """
    from upperson_log.chain import head_of, verify_log
    from upperson_log.query_log import QueryLog

    if not file.exists() and not head_of(file).exists():
        raise InputError(
            f"there is no query log {file}: name another file", code="log_not_found", path=file
        )
    with QueryLog(file) as log:
        problem = log.problem
        absent = [chain for chain, is_known in verify_log(file).absent.items() if not is_known]
        if problem or absent:
            log.acknowledge(visible_text(reason), absent)
    result: dict[str, Any] = {"file": str(file), "acknowledged": problem or None, "absent": absent}
    done = [f"acknowledged: {problem}"] if problem else []
    done += [f"acknowledged: the file that ends with {chain} is not here" for chain in absent]

    def show(_: object) -> None:
        for line in done or [f"nothing to acknowledge in {file}"]:
            print_line(line)

    print_result(result, output.as_json, show)


@app.command(cls=Command)
@grouped
def timestamp(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Query log.")],
    *,
    url: Annotated[
        str, typer.Option("--url", metavar="URL", help="Time-stamp authority (RFC 3161).")
    ],
    tsa_cert: TsaCert = None,
    output: Output,
) -> None:
    """Let a time-stamp authority stamp the last chain of a query log, which stands for all of it.

    The log is verified first. The stamp is the file FILE.CHAIN.tsr beside it; a valid one that is
    there stays. The authority gets a hash only.

    Example: `upperson-rt log timestamp console/query.log --url http://tsa.example/tsr`
    """
    from upperson_log.chain import verify_log
    from upperson_log.timestamps import (
        MOST_STAMP_BYTES,
        TimeStampServer,
        read_certificates,
        read_stamp,
    )
    from upperson_rt.files import read_bounded, write_atomically

    server = TimeStampServer(url, [] if tsa_cert is None else read_certificates(tsa_cert))
    report = verify_log(file)
    if report.problems:
        raise IntegrityError(f"{file}: {report.problems[0]}", code=report.code, path=file)
    place = file.with_name(f"{file.name}.{report.chain}.tsr")
    result = {"file": str(place), "chain": report.chain, "lines": report.lines}
    if is_new := not place.exists():  # An older stamp of the same chain proves more.
        answer, stamp = server.stamp(report.chain.encode())
        write_atomically(place, answer)
    else:
        answer = read_bounded(place, MOST_STAMP_BYTES)
        try:
            stamp = read_stamp(answer, report.chain.encode(), server.certificates)
        except IntegrityError as error:
            message = f"{place}: {error}: move this file away, and stamp the log again"
            raise IntegrityError(message, code=error.code, path=place) from error
    result |= {**asdict(stamp), "new": is_new}
    how = "stamped" if is_new else "it is stamped already,"
    shown = f"{how} at {stamp.time} by {stamp.authority}: {place}"
    print_result(result, output.as_json, lambda _: print_line(shown))

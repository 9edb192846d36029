"""`upperson-rt log timestamp`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from upperson_rt.cli.groups import grouped
from upperson_rt.cli.options import Output, TsaCert
from upperson_rt.cli.output import print_line, print_result
from upperson_rt.errors import InputError, IntegrityError


@grouped
def timestamp(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Query log.")],
    *,
    url: Annotated[
        str, typer.Option("--url", metavar="URL", help="Time-stamp authority (RFC 3161).")
    ],
    folder: Annotated[
        Path | None,
        typer.Option("--folder", metavar="FOLDER", help="Where the stamp is written."),
    ] = None,
    tsa_cert: TsaCert = None,
    output: Output,
) -> None:
    """Let a time-stamp authority stamp the last chain of a query log, which stands for all of it.

    The log is verified first. The stamp is a file FILE.CHAIN.tsr, by default beside the log. The
    authority gets a hash only. With --tsa-cert the stamp is verified at once.

    Example: `upperson-rt log timestamp console/query.log --url http://tsa.example/tsr`
    """
    from upperson_network.timestamps import TimeStampServer
    from upperson_rt.files import read_bounded, write_atomically
    from upperson_rt.log_chain import verify_log
    from upperson_rt.timestamps import MOST_STAMP_BYTES, read_stamp

    server = TimeStampServer.open(url, tsa_cert)
    report = verify_log(file)
    if report.problems:
        raise IntegrityError(f"{file}: {report.problems[0]}", code=report.code, path=file)
    if not report.chain:
        raise InputError(f"{file} has no line to stamp yet", code="log_empty", path=file)
    place = (folder or file.parent) / f"{file.name}.{report.chain}.tsr"
    content = report.chain.encode()
    if is_new := not place.exists():  # An older stamp of the same chain proves more.
        answer, stamp = server.stamp(content)
        write_atomically(place, answer)
    else:
        stamp = read_stamp(read_bounded(place, MOST_STAMP_BYTES), content, server.certificates)
    result = {
        "file": str(place), "new": is_new, "chain": report.chain, "lines": report.lines,
        **asdict(stamp),
    }  # fmt: skip

    def show(_: object) -> None:
        text = "stamped at" if is_new else "nothing new since the stamp of"
        print_line(f"{text} {stamp.time} by {stamp.authority}: {place}")

    print_result(result, output.as_json, show)

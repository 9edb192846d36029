"""`upperson-rt log timestamp`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from upperson_rt.cli.groups import grouped
from upperson_rt.cli.options import Output, TsaCert
from upperson_rt.cli.output import print_line, print_result
from upperson_rt.errors import IntegrityError


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
    from upperson_network.timestamps import TimeStampServer
    from upperson_rt.files import read_bounded, write_atomically
    from upperson_rt.log_chain import verify_log
    from upperson_rt.timestamps import MOST_STAMP_BYTES, read_certificates, read_stamp

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

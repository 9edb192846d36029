"""`upperson-rt cameras`."""

import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from upperson_rt.cli.options import AllowHostOption, CaOption, Debug, Json, NetrcOption
from upperson_rt.cli.output import print_columns, print_json, print_note, print_warning
from upperson_rt.errors import InputError, UsageError
from upperson_rt.printable import count_of

if TYPE_CHECKING:
    from upperson_camera.onvif import Answer, FoundCamera

__all__ = ["cameras"]


def cameras(
    hosts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="HOST",
            help="Camera to ask: 10.0.0.5, 10.0.0.5:8000, or the address of its ONVIF service.",
        ),
    ] = None,
    search: Annotated[
        bool,
        typer.Option(
            "--search", help="Ask the local network which cameras there are, by multicast."
        ),
    ] = False,
    interface: Annotated[
        str | None,
        typer.Option(
            "--interface",
            metavar="ADDRESS",
            help="IPv4 address of this machine in the network to search.",
            show_default="the system's choice",
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option("--timeout", min=0.5, max=60, help="Seconds to wait for answers to --search."),
    ] = 3.0,
    logins: NetrcOption = None,
    ca: CaOption = None,
    insecure: Annotated[
        list[str] | None,
        typer.Option(
            "--insecure",
            metavar="HOST",
            help="Accept any certificate of this host; each connection is logged. Repeatable.",
        ),
    ] = None,
    allow_host: AllowHostOption = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the streams of ONVIF cameras, as `watch` takes them.

    The last column can be pasted behind `upperson-rt watch`. Only what is named is asked; the local
    network only with --search, for --timeout seconds. Names and passwords come from a file
    (--netrc), go as digests to the hosts it names, and are not shown. A camera that tells no
    streams makes the exit code 3 if it was named, or if no other tells any.

    Example: `upperson-rt cameras --search --netrc cameras.netrc`
    """
    if not hosts and not search:
        raise UsageError("name cameras by their hosts, or let the local network be asked: --search")
    if not search and interface is not None:
        raise UsageError("--interface is for --search")
    from upperson_camera.access import Access
    from upperson_camera.onvif import ask_cameras, device_at, discover
    from upperson_camera.source import Logins

    known = Logins() if logins is None else Logins.read(logins)
    named = [device_at(host) for host in hosts or []]
    answers: list[Answer] = list(named)
    if search:
        found_here = discover(
            timeout,
            interface,
            begun=lambda: print_note(f"asking the local network for {timeout:g} s"),
        )
        there = {answer.host for answer in named}
        answers += [answer for host, answer in found_here.items() if host not in there]
    if not answers:
        raise InputError(
            f"no camera answered within {timeout:g} s: they must be in the same network segment as "
            "this machine, with ONVIF and its discovery turned on; --interface chooses the "
            "network, and a camera that is named is asked directly"
        )
    found = ask_cameras(
        answers,
        known,
        Access(ca_file=ca, allowed_hosts=frozenset(map(str.lower, allow_host or ()))),
        frozenset(map(str.lower, insecure or ())),
    )
    if as_json:
        print_json({"cameras": [asdict(camera) for camera in found]})
    else:
        _print(found)
    silent = [camera for camera in found if camera.problem is not None]
    refused = [camera for camera in silent if camera.host in {answer.host for answer in named}]
    if refused or len(silent) == len(found):
        raise InputError(
            f"{len(silent)} of {count_of(len(found), 'camera')} told no streams: "
            + "; ".join(f"{camera.host}: {camera.problem}" for camera in silent)
        )
    for camera in silent:
        print_warning(f"{camera.host}: {camera.problem}")


def _print(found: "list[FoundCamera]") -> None:
    rows = [
        (
            " ".join(part for part in (camera.maker, camera.model) if part) or camera.host,
            stream.profile,
            "?" if stream.width is None else f"{stream.width}x{stream.height}",
            stream.encoding or "?",
            "?" if stream.frame_rate is None else f"{stream.frame_rate:g}",
            shlex.quote(f"{camera.name}={stream.address}"),
        )
        for camera in found
        for stream in camera.streams
    ]
    if rows:
        names = ("camera", "stream", "pixels", "kind", "frames/s", "source")
        cells = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
        print_columns(cells, ("frames/s",), "source")

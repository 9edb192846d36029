"""`upperson-rt cameras`."""

import shlex
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from upperson_camera.cli.options import AllowHostOption, CaOption, NetrcOption
from upperson_rt.cli.groups import OptionGroup, grouped
from upperson_rt.cli.options import Output
from upperson_rt.cli.output import print_columns, print_json, print_note, print_warning
from upperson_rt.errors import InputError, UsageError
from upperson_rt.printable import count_of

if TYPE_CHECKING:
    from upperson_camera.onvif import Answer, FoundCamera


@dataclass(frozen=True)
class Discovery(OptionGroup, panel="Discovery"):
    """Whether the local network is searched, and how."""

    search: Annotated[
        bool,
        typer.Option("--search", help="Search the local network for cameras, by multicast."),
    ] = False
    interface: Annotated[
        str | None,
        typer.Option(
            "--interface",
            metavar="ADDRESS",
            help="IPv4 address of this machine in the network to search.",
            show_default="the system's choice",
        ),
    ] = None
    timeout: Annotated[
        float,
        typer.Option("--timeout", min=0.5, max=60, help="Seconds to wait for answers to --search."),
    ] = 3.0


@dataclass(frozen=True)
class Connection(OptionGroup, panel="Connection"):
    """Logins, and which hosts and certificates devices may have."""

    logins: NetrcOption = None
    ca: CaOption = None
    insecure: Annotated[
        list[str] | None,
        typer.Option(
            "--insecure",
            metavar="HOST",
            help="Accept any certificate of this host; each connection is logged. Repeatable.",
        ),
    ] = None
    allow_host: AllowHostOption = None


@grouped
def cameras(
    hosts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="HOST",
            help="Camera to ask: 10.0.0.5, 10.0.0.5:8000, or the address of its ONVIF service.",
        ),
    ] = None,
    *,
    discovery: Discovery,
    connection: Connection,
    output: Output,
) -> None:
    """List the streams of ONVIF cameras, as `watch` takes them.

    The last column can be pasted behind `upperson-rt watch`. Only named cameras are asked, and with
    --search the local network, for --timeout seconds. Names and passwords come from a file
    (--netrc), go as digests to the hosts in it, and are not shown. If a named camera gives no
    streams, or none of all does, the exit code is 3.

    Example: `upperson-rt cameras --search --netrc cameras.netrc`
    """
    if not hosts and not discovery.search:
        text = "name cameras by their hosts, or search the local network with --search"
        raise UsageError(text, code="no_camera_named")
    if not discovery.search and discovery.interface is not None:
        raise UsageError("--interface is for --search", code="interface_without_search")
    from upperson_camera.access import Access
    from upperson_camera.onvif import ask_cameras, device_at, discover
    from upperson_camera.source import Logins

    known = Logins() if connection.logins is None else Logins.read(connection.logins)
    timeout = discovery.timeout
    named = [device_at(host) for host in hosts or []]
    answers: list[Answer] = list(named)
    if discovery.search:
        found_here = discover(
            timeout,
            discovery.interface,
            begun=lambda: print_note(f"asking the local network for {timeout:g} s"),
        )
        there = {answer.host for answer in named}
        answers += [answer for host, answer in found_here.items() if host not in there]
    if not answers:
        raise InputError(
            f"no camera answered within {timeout:g} s: they must be in the same network segment as "
            "this machine, with ONVIF and its discovery turned on; --interface chooses the "
            "network, and a camera that is named needs no search",
            code="no_camera_found",
        )
    allowed, insecure = (
        frozenset(map(str.lower, hosts or ()))
        for hosts in (connection.allow_host, connection.insecure)
    )
    access = Access(ca_file=connection.ca, allowed_hosts=allowed)
    found = ask_cameras(answers, known, access, insecure)
    if output.as_json:
        print_json({"cameras": [asdict(camera) for camera in found]})
    else:
        _print(found)
    silent = [camera for camera in found if camera.problem is not None]
    refused = [camera for camera in silent if camera.host in {answer.host for answer in named}]
    if refused or len(silent) == len(found):
        raise InputError(
            f"{len(silent)} of {count_of(len(found), 'camera')} gave no streams: "
            + "; ".join(f"{camera.host}: {camera.problem}" for camera in silent),
            code="camera_without_streams",
            hosts=[camera.host for camera in silent],
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

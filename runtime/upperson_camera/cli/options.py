"""Options that several commands of cameras share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from upperson_rt.cli.groups import ADVANCED, OptionGroup

NetrcOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--netrc",
        envvar="UPPERSON_NETRC",
        metavar="FILE",
        help="Names and passwords of cameras, by host: lines such as  machine 10.0.0.5 login "
        "viewer password secret",
    ),
]
CaOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--ca",
        metavar="FILE",
        help="Certificates in PEM that https:// and rtsps:// cameras are verified by, besides "
        "those of the system.",
    ),
]
InsecureOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--insecure",
        metavar="CAMERA",
        help="Accept any certificate of this camera; each connection is logged. Repeatable.",
    ),
]
AllowHostOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host",
        metavar="HOST",
        help="Another host that cameras may send to, by redirects, playlists and addresses of "
        "streams; it gets no login. Repeatable.",
    ),
]


@dataclass(frozen=True)
class Connection(OptionGroup, panel=ADVANCED):
    """Which hosts and certificates network streams may have."""

    ca: CaOption = None
    insecure: InsecureOption = None
    allow_host: AllowHostOption = None

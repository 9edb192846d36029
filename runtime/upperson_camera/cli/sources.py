"""The sources of `upperson-rt watch`: those that are named, or the file of cameras."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from upperson_camera.cli.options import Connection
from upperson_rt.cli.opening import open_announced
from upperson_rt.cli.output import print_note
from upperson_rt.errors import UsageError
from upperson_rt.printable import local_time, shortened

if TYPE_CHECKING:
    from upperson_camera import PipelineSettings, Source
    from upperson_camera.config import CamerasFile
    from upperson_camera.source import Logins
    from upperson_rt.ingest.detector import Detector

_NAMED = re.compile(r"([\w.-]+(?: +[\w.-]+)*(?=[^!]*\Z)|[\w.-]+)=(.+)", re.DOTALL)
"""A name with spaces, unless a pipeline follows: those have ``=`` themselves."""


def refuse_beside(config: Path | None, **others: object) -> None:
    """Refuse a file of cameras beside what names cameras too, and neither of them."""
    given = [option for option, value in others.items() if value]
    if config is None and "SOURCE" not in given:
        raise UsageError("name a SOURCE, or a file of cameras with --config", code="no_source")
    if config is not None and given:
        why = f"--config names the cameras: its file says what {given[0]} would"
        raise UsageError(why, code="beside_config", option=given[0])


def open_config(
    path: Path,
    settings: "PipelineSettings",
    logins: "Logins",
    threads: int | None,
    defaults: Mapping[str, object],
) -> "CamerasFile":
    """Read a file of cameras; ``defaults`` hold for those that do not say otherwise."""
    from upperson_camera.source import import_extra

    import_extra("yaml", "pyyaml", "camera", "--config")
    from upperson_camera.config import CamerasFile

    opener = partial(open_detector, threads)
    return CamerasFile(path, settings, opener, logins, defaults, print_note)


def open_detector(
    threads: int | None,
    name: str,
    layout: str | None,
    person: str | None,
    score: float | None,
    pixels: str | None,
) -> "Detector":
    """Open a detector for cameras, and describe it on stderr."""
    return open_announced(name, layout, person, score, threads, "videos", pixels)


def read_logins(path: Path | None) -> "Logins":
    """Return the logins of a file in the format of ``.netrc``; none without one."""
    from upperson_camera.source import Logins

    return Logins() if path is None else Logins.read(path)


def named_sources(texts: list[str], camera: str | None, logins: "Logins") -> "dict[str, Source]":
    """Return the sources by the names of their cameras."""
    from upperson_camera import StreamReader, parse_source

    if camera is not None and len(texts) > 1:
        why = "--camera names one source; with several write  NAME=SOURCE  for each"
        raise UsageError(why, code="camera_name_for_several")
    named: dict[str, Source] = {}
    for text in texts:
        match = None if os.path.isfile(text) else _NAMED.fullmatch(text)
        source = parse_source(match[2] if match else text)
        StreamReader.require(source)
        name = camera or (match[1] if match else source.default_name)
        if name in named:
            why = f"two cameras are called {name}: write  NAME=SOURCE  for each"
            raise UsageError(why, code="camera_exists", camera=name)
        named[name] = logins.given_to(source)
    return named


def with_access(named: "dict[str, Source]", connection: Connection) -> "dict[str, Source]":
    """Return the sources with what they may connect to."""
    from upperson_camera.access import Access

    insecure = connection.insecure or ()
    if unknown := set(insecure) - set(named):
        why = (
            f"--insecure {shortened(min(unknown))}: no camera is called so, there is "
            f"{', '.join(map(shortened, named))}"
        )
        raise UsageError(why, code="camera_unknown", camera=min(unknown))
    allowed = frozenset(map(str.lower, connection.allow_host or ()))
    access = Access(ca_file=connection.ca, allowed_hosts=allowed)
    found = {
        name: replace(source, access=replace(access, insecure=name in insecure))
        for name, source in named.items()
    }
    for source in found.values():
        source.access.context()  # A file that cannot be read is refused now, not at a connection.
    return found


def begin_of_file(name: str, source: "Source") -> float | None:
    """Return the guessed start time of a file, and print it; None for a live source."""
    from upperson_camera.stream import guess_start_time

    if source.is_live:
        return None
    begins = guess_start_time(source)
    at = local_time(begins)
    print_note(f"{name}: the file begins at {at}, going by its last change; --start sets it")
    return begins

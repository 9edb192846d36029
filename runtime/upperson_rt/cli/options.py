"""Options that several commands share, defined once."""

import datetime
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from upperson_rt.arguments import LATEST_UNIX_S, read_attributes
from upperson_rt.cli.groups import ADVANCED, OptionGroup, advanced, option
from upperson_rt.errors import InputError, UsageError
from upperson_rt.printable import safe_repr

if TYPE_CHECKING:
    from upperson_rt.gallery import Filter
    from upperson_rt.ingest.service import Output as RowOutput

default_bundle = Path("bundle")
default_gallery = "gallery"

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


_LEAST_UNIX_S = 1e8
"""In 1973. A smaller number is a slip: ``24`` for ``24h``."""


def age_seconds(text: str) -> float:
    """Read an age such as ``30d``, ``12h`` or ``1.5w``; return seconds.

    Raises UsageError, with the code ``age_malformed``, for anything else.
    """
    age = _age(text.strip())
    if age is None:
        raise UsageError(
            f"{safe_repr(text)} is no age: expected a number and s, m, h, d or w, such as 30d",
            code="age_malformed",
            found=text,
        )
    return age


def _age(text: str) -> float | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    return None if match is None else float(match[1]) * _UNIT_SECONDS[match[2]]


def unix_seconds(text: str) -> float:
    """Read unix seconds, an ISO 8601 time (local without an offset), or how long ago: ``90m``.

    Raises UsageError: ``time_without_unit`` for a number that is too small for unix seconds,
    ``time_malformed`` for one that is too large, such as milliseconds, and for anything else.
    """
    ago = _age(text.strip().removeprefix("-"))
    if ago is not None:
        return time.time() - ago
    with suppress(ValueError):  # Not a number, so it must be a time.
        seconds = float(text)
        if not math.isfinite(seconds):
            raise UsageError(f"{safe_repr(text)} is no time", code="time_malformed", found=text)
        if abs(seconds) < _LEAST_UNIX_S:
            raise UsageError(
                f"{safe_repr(text)} has no unit: write how long ago, such as 24h or 24d, or a time "
                "such as 2026-11-24T14:00",
                code="time_without_unit",
                found=text,
            )
        if abs(seconds) >= LATEST_UNIX_S:
            raise UsageError(
                f"{safe_repr(text)} is too large for unix seconds: write seconds, not milliseconds",
                code="time_malformed",
                found=text,
            )
        return seconds
    try:
        # Python 3.10 does not know the Z yet.
        return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(
            f"{safe_repr(text)} is neither unix seconds nor a time such as 2026-11-24T14:00 or "
            "2026-11-24T14:00:00+01:00, nor how long ago, such as 90m, 24h or 7d",
            code="time_malformed",
            found=text,
        ) from error


def read_batch_sizes(text: str) -> list[int]:
    """Read sizes with commas between them, such as ``1,8,32``; return them in order, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,9}", part) and int(part) > 0 for part in parts):
        raise UsageError(
            f"--batch-size must be sizes such as 1,2,8,32, found '{text}'",
            code="batch_sizes_malformed",
            found=text,
        )
    return sorted({int(part) for part in parts})


def require_sheet(path: Path) -> None:
    """Check, before any work, that ``--sheet`` can be written."""
    if path.suffix.lower() != ".png":
        raise UsageError(
            f"--sheet writes PNG: {path} must end in .png", code="sheet_not_png", path=path
        )
    if not path.parent.is_dir():
        raise InputError(
            f"--sheet {path}: there is no folder {path.parent}, make it first",
            code="folder_not_found",
            path=path.parent,
        )


def require_no_empty_trust(key: Path | None) -> Path | None:
    """Refuse an empty variable: with it, a unit file would open unsigned bundles unnoticed."""
    if key is None and os.environ.get("UPPERSON_TRUST") == "":
        raise typer.BadParameter(
            "UPPERSON_TRUST is empty, expected the file of a public key: name it, or unset the "
            "variable to open any bundle"
        )
    return key


GalleryOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--gallery",
        "-g",
        envvar="UPPERSON_GALLERY",
        metavar="FOLDER|ADDRESS",
        help="Folder of the gallery, or milvus://host:port/collection.",
    ),
]
TrustOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--trust",
        envvar="UPPERSON_TRUST",
        metavar="PUBKEY",
        callback=require_no_empty_trust,
        help="Open the bundle only if this public key (PEM) verifies its signature.",
        rich_help_panel=ADVANCED,
    ),
]
Threads: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="CPU threads.",
        show_default="chosen by the backend",
        rich_help_panel=ADVANCED,
    ),
]
QueryLogOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--query-log",
        envvar="UPPERSON_QUERY_LOG",
        metavar="FILE",
        help="Append user, query and ids of hits to this file; a query that cannot be logged is "
        "not run.",
        rich_help_panel=ADVANCED,
    ),
]
Json: TypeAlias = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr."),
]
DetectorLayout: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--detector-layout",
        help="Layout of FILE.onnx: yolov5, yolov8, end-to-end, yolox, yolox-decoded, rt-detr, "
        "rt-detr-logits, rt-detr-ultralytics, rt-detr-chosen, rf-detr, nanodet, nanodet-levels, "
        "ssd or ssd-tensorflow.",
        show_default="recognized from the file",
        rich_help_panel=ADVANCED,
    ),
]
DetectorClass: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--detector-class",
        metavar="NAME|N",
        help="Class of FILE.onnx for people, by its name in the file or its number from 0.",
        show_default="person",
        rich_help_panel=ADVANCED,
    ),
]
DetectorInput: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--detector-input",
        metavar="PIXELS",
        help="Pixels that FILE.onnx was trained on: parts of rgb,bgr,0-1,0-255,centre,corner,"
        "stretch,mean=R/G/B,std=R/G/B, with commas between them.",
        show_default="those of its layout",
        rich_help_panel=ADVANCED,
    ),
]
DetectorScore: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--detector-score",
        min=0.0,
        help="Lowest score of a box of FILE.onnx or ssdlite, 0 to 1, or of hog.",
        show_default="0.4; hog 0.3",
        rich_help_panel=ADVANCED,
    ),
]
Debug: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--debug",
        help="Show the traceback of an error.",
        rich_help_panel=ADVANCED,
    ),
]


@dataclass(frozen=True)
class Backend(OptionGroup, panel="Model and gallery"):
    """How a bundle is verified and run."""

    trust: TrustOption = None
    variant: str | None = advanced(
        None, "Precision to use, such as fp32 or int8.", show_default="the bundle's default"
    )
    backend: str = advanced(
        "auto",
        "auto, onnxruntime, openvino or tensorrt. On a CPU auto takes the fastest one installed, "
        "which is measured when pictures are first embedded; for sentences alone onnxruntime, then "
        "openvino; on cuda tensorrt, then onnxruntime.",
    )
    device: str = advanced(
        "cpu", "cpu, cuda, cuda:N (tensorrt, onnxruntime), gpu or npu (openvino). Never replaced."
    )


@dataclass(frozen=True)
class Bundle(OptionGroup, panel="Model and gallery"):
    """A bundle, of which a command chooses what runs."""

    bundle: Path = option(
        default_bundle,
        "Folder of the exported model.",
        "--bundle",
        "-b",
        envvar="UPPERSON_BUNDLE",
    )
    trust: TrustOption = None
    threads: Threads = None


@dataclass(frozen=True)
class Model(Backend, Bundle):
    """A bundle, and what runs it."""


@dataclass(frozen=True)
class Place(OptionGroup, panel="Model and gallery"):
    """A gallery."""

    gallery: GalleryOption = default_gallery


@dataclass(frozen=True)
class Searched(Place):
    """A gallery that is searched, and the log of its queries."""

    allow_distilled: bool = advanced(
        False, "Also search a gallery of the model's student or teacher."
    )
    query_log: QueryLogOption = None


@dataclass(frozen=True)
class Where(OptionGroup, panel="Filter"):
    """A filter of pictures."""

    camera: list[str] | None = option(
        None, "Only pictures of this camera; may be given again.", show_default="all"
    )
    since: float | None = option(
        None,
        "Only pictures taken at or after this time: how long ago, such as 90m, 24h or 7d, ISO "
        "8601 (local), or unix seconds.",
        parser=unix_seconds,
        metavar="TIME",
    )
    until: float | None = option(
        None, "Only pictures taken before this time.", parser=unix_seconds, metavar="TIME"
    )
    track: str | None = advanced(None, "Only pictures of the track of this name.")
    attribute: list[str] | None = advanced(
        None,
        "Only pictures whose attribute KEY is VALUE; may be given again.",
        metavar="KEY=VALUE",
        show_default="any",
    )

    def as_filter(self) -> "Filter":
        """Return the filter."""
        from upperson_rt.gallery import Filter

        return Filter(
            camera=self.camera or None,
            since=self.since,
            until=self.until,
            track=self.track,
            attributes=read_attributes(self.attribute, "--attribute"),
        )


@dataclass(frozen=True)
class Detection(OptionGroup, panel="Detector"):
    """A detector, if any."""

    detector: str | None = option(
        None, "Detector of people, as for `watch`, such as auto or FILE.onnx."
    )
    detector_layout: DetectorLayout = None
    detector_class: DetectorClass = None
    detector_score: DetectorScore = None
    detector_input: DetectorInput = None

    def require_no_options(self) -> None:
        """Refuse options of a detector where none is named."""
        for field in fields(self):
            if self.detector is None and getattr(self, field.name) is not None:
                name = f"--{field.name.replace('_', '-')}"
                raise UsageError(
                    f"{name} is of no use without --detector: name a detector, too",
                    code="detector_missing",
                    option=name,
                )


@dataclass(frozen=True)
class Delivery(OptionGroup, panel="Output"):
    """Where committed rows are sent."""

    outputs: list[str] | None = option(
        None,
        "Also send each committed row to this extension of upperson.outputs. Repeatable.",
        "--output",
        metavar="NAME",
    )

    @contextmanager
    def opened(self) -> "Iterator[list[RowOutput]]":
        """Open the outputs; close them at the end, also after an error."""
        from upperson_rt.ingest.service import open_outputs

        found: list[RowOutput] = []
        with ExitStack() as stack:
            for name in self.outputs or ():
                found += open_outputs([name])
                stack.callback(found[-1].close)
            yield found


@dataclass(frozen=True)
class Output(OptionGroup, panel="Output"):
    """How the command reports."""

    as_json: Json = False
    debug: Debug = False

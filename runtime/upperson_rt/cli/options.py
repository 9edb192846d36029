"""Options that several commands share, defined once."""

import datetime
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from upperson_rt.arguments import read_attributes
from upperson_rt.cli.groups import ADVANCED, OptionGroup
from upperson_rt.errors import InputError, UsageError

if TYPE_CHECKING:
    from upperson_rt.gallery import Filter

__all__ = [
    "AllowHostOption",
    "Attributes",
    "BackendOption",
    "BundleOption",
    "CaOption",
    "Cameras",
    "Debug",
    "DetectorClass",
    "DetectorLayout",
    "DetectorScore",
    "DeviceOption",
    "GalleryOption",
    "InsecureOption",
    "Json",
    "Model",
    "NetrcOption",
    "OptionalBundleOption",
    "OptionalGalleryOption",
    "Output",
    "QueryLogOption",
    "Searched",
    "Since",
    "Threads",
    "Track",
    "TrustOption",
    "Until",
    "VariantOption",
    "Where",
    "age_seconds",
    "default_bundle",
    "default_gallery",
    "read_batch_sizes",
    "require_no_detector_options",
    "require_sheet",
    "unix_seconds",
]


default_bundle = Path("bundle")
default_gallery = "gallery"


_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def age_seconds(text: str) -> float:
    """Read an age such as ``30d``, ``12h`` or ``1.5w``; return seconds."""
    age = _age(text.strip())
    if age is None:
        raise typer.BadParameter(
            f"'{text}' is no age: expected a number and s, m, h, d or w, such as 30d"
        )
    return age


def _age(text: str) -> float | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    return None if match is None else float(match[1]) * _UNIT_SECONDS[match[2]]


def unix_seconds(text: str) -> float:
    """Read unix seconds, an ISO 8601 time (local without an offset), or how long ago: ``90m``."""
    ago = _age(text.strip().removeprefix("-"))
    if ago is not None:
        return time.time() - ago
    try:
        seconds = float(text)
    except ValueError:
        pass  # Not a number, so it must be a time.
    else:
        if not math.isfinite(seconds):
            raise typer.BadParameter(f"'{text}' is no time")
        return seconds
    try:
        # Python 3.10 does not know the Z yet.
        return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise typer.BadParameter(
            f"'{text}' is neither unix seconds nor a time such as 2026-11-24T14:00 or "
            "2026-11-24T14:00:00+01:00, nor how long ago, such as 90m, 24h or 7d"
        ) from error


def read_batch_sizes(text: str) -> list[int]:
    """Read sizes with commas between them, such as ``1,8,32``; return them in order, each once.

    Raises:
        UsageError: A part is not a whole number from 1.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,9}", part) and int(part) > 0 for part in parts):
        raise UsageError(f"--batch must be sizes such as 1,2,8,32, found '{text}'")
    return sorted({int(part) for part in parts})


def require_no_detector_options(options: Mapping[str, object]) -> None:
    """Refuse options that say how a detector works, where there is none.

    Raises:
        UsageError: One of them is not None.
    """
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UsageError(f"{given[0]} is of no use without --detector: name a detector, too")


def require_sheet(path: Path) -> None:
    """Make sure, before any work, that a picture can be written as PNG where it was asked for.

    Raises:
        UsageError: Its name does not end in ``.png``.
        InputError: There is no such folder.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(f"--sheet writes PNG: {path} must end in .png")
    if not path.parent.is_dir():
        raise InputError(f"--sheet {path}: there is no folder {path.parent}, make it first")


def _require_no_empty_trust(key: Path | None) -> Path | None:
    """Refuse an empty variable: a unit file with an unset one would check nothing, unnoticed."""
    if key is None and os.environ.get("UPPERSON_TRUST") == "":
        raise typer.BadParameter(
            "UPPERSON_TRUST is empty, expected the file of a public key: name it, or unset the "
            "variable to open bundles of anybody"
        )
    return key


BundleOption: TypeAlias = Annotated[
    Path,
    typer.Option("--bundle", "-b", envvar="UPPERSON_BUNDLE", help="Folder of the exported model."),
]
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
OptionalBundleOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--bundle",
        "-b",
        envvar="UPPERSON_BUNDLE",
        help="Bundle to check.",
        show_default="./bundle, if it is there",
    ),
]
OptionalGalleryOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--gallery",
        "-g",
        envvar="UPPERSON_GALLERY",
        metavar="FOLDER|ADDRESS",
        help="Gallery to check.",
        show_default="./gallery, if it is there",
    ),
]
VariantOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--variant",
        help="Precision to use, such as fp32 or int8.",
        show_default="the bundle's default",
        rich_help_panel=ADVANCED,
    ),
]
TrustOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--trust",
        envvar="UPPERSON_TRUST",
        metavar="PUBKEY",
        callback=_require_no_empty_trust,
        help="Refuse the bundle unless the owner of this public key (PEM) has signed it as it is.",
        rich_help_panel=ADVANCED,
    ),
]
BackendOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--backend",
        help="auto, onnxruntime, openvino or tensorrt. On a CPU auto takes the fastest one "
        "installed, which is measured when pictures are first embedded; for sentences alone "
        "onnxruntime, then openvino; on cuda tensorrt, then onnxruntime.",
        rich_help_panel=ADVANCED,
    ),
]
DeviceOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--device",
        help="cpu, cuda, cuda:N (tensorrt, onnxruntime), gpu or npu (openvino). Never replaced.",
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
Since: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--since",
        parser=unix_seconds,
        metavar="TIME",
        help="Only pictures taken at or after this time: ISO 8601 (local), unix seconds, or how "
        "long ago, such as 90m, 24h or 7d.",
    ),
]
Until: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--until", parser=unix_seconds, metavar="TIME", help="Only pictures taken before this time."
    ),
]
Cameras: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--camera", help="Only pictures of this camera; may be given again.", show_default="all"
    ),
]
Track: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--track", help="Only pictures of the track of this name.", rich_help_panel=ADVANCED
    ),
]
Attributes: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="KEY=VALUE",
        help="Only pictures whose attribute KEY is VALUE; may be given again.",
        show_default="any",
        rich_help_panel=ADVANCED,
    ),
]
QueryLogOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--query-log",
        envvar="UPPERSON_QUERY_LOG",
        metavar="FILE",
        help="Append who asked what, and the ids found, to this file; a query that "
        "cannot be logged is not answered.",
        rich_help_panel=ADVANCED,
    ),
]
Json: TypeAlias = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr."),
]
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
DetectorLayout: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--detector-layout",
        help="Layout of FILE.onnx: yolov5, yolov8, end-to-end, yolox, yolox-decoded, rt-detr, "
        "rt-detr-logits, rt-detr-ultralytics, rt-detr-chosen or rf-detr.",
        show_default="told from the file",
    ),
]
DetectorClass: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--detector-class",
        metavar="NAME|N",
        help="Class of FILE.onnx that is people, by its name in the file or its number from 0.",
        show_default="person",
    ),
]
DetectorScore: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--detector-score",
        min=0.0,
        help="Least score of a box of FILE.onnx, 0 to 1, or of hog.",
        show_default="0.4; hog 0.3",
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
class Model(OptionGroup, panel="Model and gallery"):
    """The exported model, and what runs it."""

    bundle: BundleOption = default_bundle
    trust: TrustOption = None
    variant: VariantOption = None
    backend: BackendOption = "auto"
    device: DeviceOption = "cpu"
    threads: Threads = None


@dataclass(frozen=True)
class Searched(OptionGroup, panel="Model and gallery"):
    """The gallery that is searched, and who may know of it."""

    gallery: GalleryOption = default_gallery
    allow_distilled: Annotated[
        bool,
        typer.Option(
            "--allow-distilled",
            help="Also search a gallery of the model's student or teacher.",
            rich_help_panel=ADVANCED,
        ),
    ] = False
    query_log: QueryLogOption = None


@dataclass(frozen=True)
class Where(OptionGroup, panel="Filter"):
    """Which pictures of a gallery count."""

    camera: Cameras = None
    since: Since = None
    until: Until = None
    track: Track = None
    where: Attributes = None

    def as_filter(self) -> "Filter":
        """Return the filter.

        Raises:
            UsageError: The options contradict each other, or a pair of --where is malformed.
        """
        from upperson_rt.gallery import Filter

        return Filter(
            camera=self.camera or None,
            since=self.since,
            until=self.until,
            track=self.track,
            attributes=read_attributes(self.where, "--where"),
        )


@dataclass(frozen=True)
class Output(OptionGroup, panel="Output"):
    """How the command reports."""

    as_json: Json = False
    debug: Debug = False

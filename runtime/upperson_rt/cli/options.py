"""Options that several commands share, defined once."""

import datetime
import json
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from upperson_rt.errors import UsageError

__all__ = [
    "Attributes",
    "BackendOption",
    "BundleOption",
    "Cameras",
    "Debug",
    "DeviceOption",
    "GalleryOption",
    "Json",
    "OptionalBundleOption",
    "OptionalGalleryOption",
    "Since",
    "Threads",
    "Track",
    "Until",
    "VariantOption",
    "default_bundle",
    "default_gallery",
    "read_attributes",
    "read_batch_sizes",
    "unix_seconds",
]

default_bundle = Path("bundle")
default_gallery = "gallery"


def unix_seconds(text: str) -> float:
    """Read unix seconds, or an ISO 8601 time; one without an offset is local time."""
    try:
        return float(text)
    except ValueError:
        pass  # Not a number, so it must be a time.
    try:
        # Python 3.10 does not know the Z yet.
        return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except ValueError as error:
        raise typer.BadParameter(
            f"'{text}' is neither unix seconds nor a time such as 2026-11-24T14:00 or "
            "2026-11-24T14:00:00+01:00"
        ) from error


def read_batch_sizes(text: str) -> list[int]:
    """Read sizes with commas between them, such as ``1,8,32``; return them in order, each once.

    Raises:
        UsageError: A part is not a whole number from 1.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--batch must be sizes such as 1,2,8,32, found '{text}'")
    return sorted({int(part) for part in parts})


def read_attributes(texts: list[str] | None) -> dict[str, str | int | float | bool]:
    """Read ``KEY=VALUE``; a value that is a number, true or false is one, any other is a text.

    Quotes make a text of anything: ``KEY="1"``.

    Raises:
        UsageError: There is no ``=``, or the value is neither of these.
    """
    found: dict[str, str | int | float | bool] = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--attribute must be KEY=VALUE, such as colour=red, found '{text}'")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        found[key] = parsed if isinstance(parsed, (str, int, float)) else value
    return found


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
    ),
]
BackendOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--backend",
        help="auto, onnxruntime or openvino. auto takes the first one installed, in this order.",
    ),
]
DeviceOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--device", help="cpu, cuda, cuda:N (onnxruntime), gpu or npu (openvino). Never replaced."
    ),
]
Threads: TypeAlias = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads.", show_default="chosen by the backend"),
]
Since: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--since",
        parser=unix_seconds,
        metavar="TIME",
        help="Only pictures taken at or after this time: ISO 8601 (local) or unix seconds.",
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
    str | None, typer.Option("--track", help="Only pictures of the track of this name.")
]
Attributes: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--attribute",
        metavar="KEY=VALUE",
        help="Only pictures whose attribute KEY is VALUE; may be given again.",
        show_default="any",
    ),
]
Json: TypeAlias = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr."),
]
Debug: TypeAlias = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

"""Pictures of a site with captions, from a file of one JSON object a line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from upperson_rt.errors import InputError
from upperson_rt.files import read_bounded
from upperson_rt.strict import Constraint, parse_json, read_fields
from upperson_scores.fitting import LabelledFiles

_MOST_BYTES = 256 << 20
_IS_PID = Constraint(lambda value: 0 <= value < 1 << 53, "a whole number from 0")
_NOT_EMPTY = Constraint(lambda value: bool(value.strip()), "a sentence")


@dataclass(frozen=True, kw_only=True)
class _Line:
    """One caption of one picture."""

    image: str
    """Path of the picture, relative to the file's folder."""
    pid: Annotated[int, _IS_PID]
    """Number of the person."""
    caption: Annotated[str, _NOT_EMPTY]
    camera: str | None = None
    split: str | None = None
    """Of a data set, not read; all lines count."""
    attributes: Any = None
    """Not read."""


def read_annotations(path: Path) -> LabelledFiles:
    """Read ``{"image": ..., "pid": ..., "caption": ..., "camera": ...}`` lines.

    Raises:
        InputError: It cannot be read, or a line is malformed or names a missing picture.
    """
    captions: dict[str, list[str]] = {}
    first: dict[str, _Line] = {}
    text = read_bounded(path, _MOST_BYTES).decode("utf-8", "replace")
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        found = read_fields(_Line, parse_json(line, where), where)
        if first.setdefault(found.image, found).pid != found.pid:
            raise InputError(
                f"{where}: {found.image} shows person {found.pid} here and person "
                f"{first[found.image].pid} before: a picture shows one person",
                code="picture_of_two_people",
                line=number,
            )
        captions.setdefault(found.image, []).append(found.caption)
    files = [path.parent / name for name in captions]
    for file in files:
        if not file.resolve().is_relative_to(path.parent.resolve()):
            raise InputError(
                f"{path} names {file}, which is outside of its folder",
                code="path_outside",
                path=str(file),
            )
        if not file.is_file():
            raise InputError(
                f"{path} names {file}, which is not there: paths are relative to the file's folder",
                code="picture_missing",
                path=str(file),
            )
    lines = [first[name] for name in captions]
    return LabelledFiles(
        source=path.name,
        files=files,
        people_N=np.array([line.pid for line in lines], np.int64),
        cameras_N=np.array([line.camera or "" for line in lines], np.str_),
        captions=[*captions.values()],
    )

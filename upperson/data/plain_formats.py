"""The project's own two formats, for people's own pictures: a line a caption, in JSON or in CSV.

``annotations.jsonl`` in the data set's folder:

    {"image": "images/0001.jpg", "pid": 1, "caption": "...", "split": "train", "camera": "c1",
     "attributes": {"gender": "woman", "upper": "coat", "upper_colour": "red"}}

``annotations.csv``, columns in any order:

    image,pid,caption,split,camera
    images/0001.jpg,1,"A woman, in a red coat.",train,c1

``image`` is relative to the folder; ``split`` (train, val or test; default train), ``camera`` and
``attributes`` may be left out, in CSV also by an empty cell; CSV has no attributes. An image with
several captions has several lines.
"""

import csv
import io
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from upperson.data.annotations import (
    AnnotatedSet,
    Annotation,
    Problem,
    annotation,
    cut,
    decode_json,
    object_fields,
    parse_each,
)
from upperson_rt.errors import InputError

PLAIN_FORMATS = ("jsonl", "csv")

_REQUIRED: dict[str, type] = {"image": str, "pid": int, "caption": str}
_OPTIONAL: dict[str, type] = {"split": str, "camera": str}
_INTEGER = re.compile(r"-?[0-9]{1,100}")


def annotations_file(name: str) -> str:
    """Return the name of a format's file."""
    return f"annotations.{name}"


def open_plain_format(name: str, root: Path) -> AnnotatedSet:
    """Find a data set in one of `PLAIN_FORMATS`.

    Raises:
        InputError: There is no such file, or it has no usable header.
    """
    path = root / annotations_file(name)
    if not path.is_file():
        if below := sorted(str(found.parent) for found in root.glob(f"*/{path.name}")):
            ways = f"there is one in {', '.join(below[:3])}: pass that with --root"
        else:
            ways = (
                "pass --root with the folder that holds it, name its format with --dataset, or "
                "make one with  upperson data synthesize"
            )
        raise InputError(f"expected a data set with {path.name} in {root}, found none: {ways}")
    return AnnotatedSet(
        files=(path,),
        image_folder=root,
        entries=parse_each(_lines(path), _parse) if name == "jsonl" else _read_csv(path),
        several_entries_per_image=True,
        id_in_two_splits="error",
    )


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", line


def _parse(where: str, line: bytes) -> Annotation:
    return _annotation(where, decode_json(line), _OPTIONAL | {"attributes": dict})


def _annotation(where: str, entry: object, optional: Mapping[str, type] = _OPTIONAL) -> Annotation:
    fields = object_fields(entry, _REQUIRED, optional)
    return annotation(
        where,
        image=fields["image"],
        pid=fields["pid"],
        captions=[fields["caption"]],
        split=fields.get("split", "train"),
        camera=fields.get("camera"),
        attributes=fields.get("attributes") if "attributes" in optional else None,
    )


def _read_csv(path: Path) -> Iterator[Annotation | Problem]:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8: {error}") from error
    rows = _rows(path, text)
    where, first = next(rows, (f"{path}, line 1", []))
    header = [] if isinstance(first, csv.Error) else [cell.strip() for cell in first]
    if not set(_REQUIRED) <= set(header) or len(set(header)) < len(header):
        raise InputError(
            f"{where}: expected a header with the columns image,pid,caption[,split,camera], each "
            f"once and separated by commas, found {cut(','.join(header)) or 'none'}"
        )
    return parse_each(rows, partial(_parse_row, header=header))


def _rows(path: Path, text: str) -> Iterator[tuple[str, list[str] | csv.Error]]:
    # Strict, so that a quote that is never closed is told where it begins.
    rows = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    while True:
        where = f"{path}, line {rows.line_num + 1}"  # The first of a row's lines.
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield where, error
            continue
        if row:
            yield where, row


def _parse_row(where: str, row: list[str] | csv.Error, *, header: list[str]) -> Annotation:
    if isinstance(row, csv.Error):
        raise InputError(f"not CSV: {row}") from row
    if len(row) != len(header):
        raise InputError(
            f"expected {len(header)} cells as in the header, found {len(row)}: a caption with a "
            "comma in it stands in double quotes"
        )
    cells: dict[str, object] = dict(zip(header, row, strict=True))
    for name in _OPTIONAL:
        if cells.get(name) == "":
            del cells[name]
    pid = str(cells["pid"]).strip()
    return _annotation(where, cells | {"pid": int(pid) if _INTEGER.fullmatch(pid) else pid})

"""What every annotation format is read into, checks that all share, and the two plain formats.

A format is read as a stream of `Annotation` and `Problem`, so that one and the same code serves the
strict reader, which refuses the first error, and the check, which lists them all.
"""

import csv
import difflib
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args

from upperson_rt.errors import InputError
from upperson_rt.files import read_bounded

MOST_BYTES = 256 << 20
"""Of a file that is read as a whole; half a million captions with their paths take 100 MB."""

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

Severity = Literal["error", "warning", "note"]
"""Training would fail or its numbers would be wrong; worth a look; only information."""

ProblemKind = Literal[
    "broken_record", "no_caption", "conflicting_image", "id_in_two_splits", "missing_folder",
    "missing_image", "broken_image", "truncated_image", "no_records", "empty_caption",
    "duplicate_record", "outdated_splits", "counts_differ", "unused_train_ids", "unlisted_image",
]  # fmt: skip

Attributes: TypeAlias = Mapping[str, str | bool | int | float | None]
"""What is true of the person in a picture, such as ``{"upper": "coat", "upper_colour": "red"}``."""

ATTRIBUTE_KINDS: Mapping[str, type] = {
    "gender": str,
    "hair_colour": str,
    "hair_style": str,
    "headwear": str,
    "headwear_colour": str,
    "glasses": bool,
    "upper": str,
    "upper_colour": str,
    "pattern": str,
    "sleeves": str,
    "lower": str,
    "lower_colour": str,
    "shoes": str,
    "shoe_colour": str,
    "bag": str,
    "bag_colour": str,
    "accessory": str,
    "accessory_colour": str,
    "skin": int,
}
"""Attributes that mean something here, as in synthetic people; any of them may also be null."""

Item = TypeVar("Item")

_SHOWN_CHARACTERS = 60
_NEARLY = 0.9
"""Likeness from which on an unknown attribute is a known one misspelt, such as upper_color."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """One entry of an annotation file; its fields are checked, its image is not opened."""

    where: str
    """File and place in it, for messages."""

    image: str
    """Path relative to the set's image folder; stays inside it."""

    pid: int
    """Identity, 0 to 2**63 - 1."""

    captions: tuple[str, ...]
    """May be empty, or hold empty captions."""

    split: Split
    camera: str | None = None

    attributes: Attributes | None = None
    """None where the entry has none."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong or remarkable, as one line."""

    kind: ProblemKind
    severity: Severity
    text: str

    where: str | None = None
    """File and place in it."""

    cause: InputError | None = None
    """Why a record cannot be read."""

    def as_error(self) -> InputError:
        """Return the problem as an error with the code and fields of its cause."""
        if self.cause is None:
            return InputError(self.text, code=self.kind, where=self.where)
        fields = self.cause.fields | {"where": self.where}
        return InputError(self.text, code=self.cause.code, **fields)


class Counts(NamedTuple):
    """Size of a split."""

    ids: int
    images: int
    captions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotatedSet:
    """A data set that was found, with its entries still to be read."""

    files: tuple[Path, ...]
    """Annotation files."""

    image_folder: Path

    entries: Iterator[Annotation | Problem]
    """In file order; can be read once."""

    several_entries_per_image: bool
    """Whether an image's captions come as several entries. Else each entry is a record."""

    id_in_two_splits: Severity | None
    """What an identity in two splits is; None where ids are numbers of images, not of people."""

    published: Mapping[Split, Counts] | None = None
    """Sizes of a published set; a split that does not exist is left out."""

    outdated: Mapping[Split, int] | None = None
    """People in each split of an earlier release that no published number is about."""


def parse_each(
    items: Iterable[tuple[str, Item]], parse: Callable[[str, Item], Annotation]
) -> Iterator[Annotation | Problem]:
    """Parse items one by one; an InputError becomes a problem that names the item's place."""
    for where, item in items:
        try:
            parsed: Annotation | Problem = parse(where, item)
        except InputError as error:
            parsed = Problem("broken_record", "error", f"{where}: {error}", where, error)
        yield parsed


def decode_json(text: bytes, prefix: str = "") -> Any:
    """Parse JSON in UTF-8, with or without a byte order mark; InputError if it is none."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{prefix}not JSON in UTF-8: {error}", code="not_json") from error


def object_fields(
    entry: object, required: Mapping[str, type], optional: Mapping[str, type] | None = None
) -> dict[str, Any]:
    """Return a JSON object some of whose keys have given types.

    Published files have up to half a million entries, other keys, and texts that may be empty,
    unlike files of our own (`upperson_rt.strict`).
    """
    if not isinstance(entry, dict):
        raise InputError(
            f"expected a JSON object, found {type(entry).__name__}",
            code="not_an_object",
            found=type(entry).__name__,
        )
    for key, kind in (dict(required) | dict(optional or {})).items():
        if key not in entry:
            if key in required:
                found = cut(", ".join(entry)) or "none"
                raise InputError(
                    f"key '{key}' is missing, found {found}", code="key_missing", key=key
                )
        # bool is an int to Python, but never an identity.
        elif not isinstance(entry[key], kind) or isinstance(entry[key], bool):
            raise InputError(
                f"'{key}' must be {kind.__name__}, found {cut(repr(entry[key]))}",
                code="wrong_type",
                key=key,
                expected=kind.__name__,
            )
    return entry


def annotation(
    where: str,
    *,
    image: str,
    pid: int,
    captions: Sequence[object],
    split: str,
    camera: str | None = None,
    attributes: Mapping[str, object] | None = None,
) -> Annotation:
    """Build an annotation from fields of the right type; InputError if a value is not allowed."""
    if split not in SPLITS:
        raise InputError(
            f"split must be one of {', '.join(SPLITS)}, found {cut(repr(split))}",
            code="split_unknown",
            split=split,
        )
    path = Path(image)
    if path.is_absolute() or ".." in path.parts:
        raise InputError(
            f"image path {cut(repr(image))} leaves the data set's folder",
            code="path_outside_folder",
        )
    if not path.parts:
        raise InputError("the image path is empty", code="path_empty")
    if not 0 <= pid < 2**63:
        problem = "is negative" if pid < 0 else "does not fit 64 bits"
        raise InputError(
            f"pid {cut(str(pid))} {problem}: number people from 0", code="pid_out_of_range"
        )
    texts = []
    for caption in captions:
        if not isinstance(caption, str):
            raise InputError(
                f"a caption must be a string, found {cut(repr(caption))}", code="caption_not_text"
            )
        if not _is_unicode(caption):
            raise InputError(
                f"the caption {cut(repr(caption))} has half a surrogate pair in it",
                code="caption_not_unicode",
            )
        texts.append(caption)
    truth = None if attributes is None else _attributes(attributes)
    return Annotation(where, str(path), pid, tuple(texts), split, camera, truth)


def _attributes(found: Mapping[str, object]) -> Attributes:
    """Check names and values. Unknown names are kept, unless one is nearly a known name."""
    checked: dict[str, Any] = {}
    for name, value in found.items():
        kind = ATTRIBUTE_KINDS.get(name)
        if kind is None and (near := difflib.get_close_matches(name, ATTRIBUTE_KINDS, 1, _NEARLY)):
            raise InputError(
                f"attribute {cut(repr(name))} is unknown: did you mean '{near[0]}'?",
                code="attribute_unknown",
                attribute=name,
                suggestion=near[0],
            )
        if not (value is None or type(value) is kind or (kind is None and _is_scalar(value))):
            expected = "a string, a number or a boolean" if kind is None else kind.__name__
            raise InputError(
                f"attribute {cut(repr(name))} must be {expected}, or null for no such thing, "
                f"found {cut(repr(value))}",
                code="attribute_wrong_type",
                attribute=name,
                expected=expected,
            )
        if isinstance(value, str) and not (value.strip() and _is_unicode(value)):
            raise InputError(
                f"attribute {cut(repr(name))} is no text: {cut(repr(value))}",
                code="attribute_not_text",
                attribute=name,
            )
        checked[name] = value
    return checked


def _is_scalar(value: object) -> bool:
    return math.isfinite(value) if isinstance(value, float) else isinstance(value, str | bool | int)


def cut(text: str) -> str:
    """Shorten a text to what fits into a message."""
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _is_unicode(text: str) -> bool:
    # JSON can spell half a surrogate pair; the tokenizer would fail on it later.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# --- The project's own two formats: a line a caption, in JSON or in CSV
#
# ``annotations.jsonl`` in the data set's folder:
#
#     {"image": "images/0001.jpg", "pid": 1, "caption": "...", "split": "train", "camera": "c1",
#      "attributes": {"gender": "woman", "upper": "coat", "upper_colour": "red"}}
#
# ``annotations.csv``, columns in any order:
#
#     image,pid,caption,split,camera
#     images/0001.jpg,1,"A woman, in a red coat.",train,c1
#
# ``image`` is relative to the folder; ``split`` (train, val or test; default train), ``camera`` and
# ``attributes`` may be left out, in CSV also by an empty cell; CSV has no attributes. An image with
# several captions has several lines.

PLAIN_FORMATS = ("jsonl", "csv")

_REQUIRED: dict[str, type] = {"image": str, "pid": int, "caption": str}
_OPTIONAL: dict[str, type] = {"split": str, "camera": str}
_LONGEST_LINE = 1 << 20
_INTEGER = re.compile(r"-?[0-9]{1,100}")


def annotations_file(name: str) -> str:
    """Return the name of a format's file."""
    return f"annotations.{name}"


def open_plain_format(name: str, root: Path) -> AnnotatedSet:
    """Find a data set in one of `PLAIN_FORMATS`; InputError without a file or a usable header."""
    path = root / annotations_file(name)
    if not path.is_file():
        if below := sorted(str(found.parent) for found in root.glob(f"*/{path.name}")):
            ways = f"there is one in {', '.join(below[:3])}: pass that with --root"
        else:
            ways = (
                "pass --root with the folder that holds it, name its format with --dataset, or "
                "make one with  upperson data synthesize"
            )
        raise InputError(
            f"expected a data set with {path.name} in {root}, found none: {ways}",
            code="dataset_not_found",
            path=path,
        )
    return AnnotatedSet(
        files=(path,),
        image_folder=root,
        entries=parse_each(_lines(path), _parse_line) if name == "jsonl" else _read_csv(path),
        several_entries_per_image=True,
        id_in_two_splits="error",
    )


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        for number in itertools.count(1):
            where, line = f"{path}, line {number}", file.readline(_LONGEST_LINE + 1)
            if not line:
                return
            if len(line) > _LONGEST_LINE:
                raise InputError(
                    f"{where}: longer than {_LONGEST_LINE >> 20} MiB: expected one JSON object a "
                    "line, each with one caption",
                    code="line_too_long",
                    where=where,
                )
            if line.strip():
                yield where, line


def _parse_line(where: str, line: bytes) -> Annotation:
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
    content = read_bounded(path, MOST_BYTES)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        where = f"{path}, line {line}"
        raise InputError(f"{where}: not UTF-8: {error}", code="not_utf8", where=where) from error
    rows = _rows(path, text)
    where, first = next(rows, (f"{path}, line 1", []))
    header = [] if isinstance(first, csv.Error) else [cell.strip() for cell in first]
    if not set(_REQUIRED) <= set(header) or len(set(header)) < len(header):
        # No word of the file, which may be a link to a secret.
        missing = [name for name in _REQUIRED if name not in header]
        found = f"{len(header)}, without {', '.join(missing)}" if missing else "one of them twice"
        raise InputError(
            f"{where}: expected a header with the columns image,pid,caption[,split,camera], each "
            f"once and separated by commas, found {found}",
            code="header_wrong",
            where=where,
            missing=missing,
        )
    return parse_each(rows, partial(_parse_row, header=header))


def _rows(path: Path, text: str) -> Iterator[tuple[str, list[str] | csv.Error]]:
    # Strict, so that an error names the line where an unclosed quote begins.
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
        raise InputError(f"not CSV: {row}", code="not_csv") from row
    if len(row) != len(header):
        raise InputError(
            f"expected {len(header)} cells as in the header, found {len(row)}: a caption with a "
            "comma in it stands in double quotes",
            code="cells_wrong",
            expected=len(header),
            found=len(row),
        )
    cells: dict[str, object] = dict(zip(header, row, strict=True))
    for name in _OPTIONAL:
        if cells.get(name) == "":
            del cells[name]
    pid = str(cells["pid"]).strip()
    return _annotation(where, cells | {"pid": int(pid) if _INTEGER.fullmatch(pid) else pid})

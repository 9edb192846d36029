"""Annotated person crops as plain records, and the reader of the project's own format.

``annotations.jsonl`` in the data set's folder holds one caption a line:

    {"image": "images/0001.jpg", "pid": 1, "caption": "...", "split": "train", "camera": "c1"}

``image`` is relative to the folder; ``split`` (train, val or test; default train) and ``camera``
may be left out.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from upperson_rt._strict_json import suggestion
from upperson_rt.errors import InputError, UsageError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

ANNOTATIONS = "annotations.jsonl"
_REQUIRED: dict[str, type] = {"image": str, "pid": int, "caption": str}
_OPTIONAL: dict[str, type] = {"split": str, "camera": str}


@dataclass(frozen=True, slots=True)
class Record:
    """One crop with its captions."""

    image: Path
    """Image file, absolute or relative to the working directory."""

    pid: int
    """Identity, unique across splits."""

    captions: tuple[str, ...]
    """At least one sentence."""

    camera: str | None = None


def read_dataset(name: str, root: Path) -> dict[Split, list[Record]]:
    """Read a data set by the name of its annotation format.

    Raises:
        UsageError: The format is unknown.
        InputError: The data set cannot be used.
    """
    match name:
        case "jsonl":
            return read_jsonl(root)
    raise UsageError(f"data set format '{name}' is unknown, {suggestion(name, ['jsonl'])}")


def read_jsonl(root: Path) -> dict[Split, list[Record]]:
    """Read ``root/annotations.jsonl``, grouping captions by image, in file order.

    Raises:
        InputError: No such file, a malformed line (named by its number), an image path that leaves
            the folder, one image with two identities or splits, or one identity in two splits.
    """
    path = root / ANNOTATIONS
    if not path.is_file():
        raise InputError(
            f"expected a data set with {ANNOTATIONS} in {root}, found none: pass --root with the "
            f"folder that holds it, or make one with  upperson data synthesize"
        )
    captions: dict[str, list[str]] = {}
    facts: dict[str, tuple[Split, int, str | None]] = {}
    home: dict[int, Split] = {}
    for number, entry in _lines(path):
        where = f"{path}, line {number}"
        split = entry.get("split", "train")
        if split not in SPLITS:
            raise InputError(f"{where}: split must be one of {', '.join(SPLITS)}, found '{split}'")
        image, pid = entry["image"], entry["pid"]
        if not entry["caption"].strip():
            raise InputError(f"{where}: the caption is empty: write one or delete the line")
        if Path(image).is_absolute() or ".." in Path(image).parts:
            raise InputError(f"{where}: image path '{image}' leaves the data set's folder")
        if abs(pid) >= 2**63:
            raise InputError(f"{where}: pid {pid} does not fit 64 bits: number people from 0")
        fact = (split, pid, entry.get("camera"))
        if facts.setdefault(image, fact) != fact:
            raise InputError(
                f"{where}: image '{image}' had (split, pid, camera) {facts[image]} before and has "
                f"{fact} here: one image is one person in one split"
            )
        if home.setdefault(pid, split) != split:
            raise InputError(
                f"{where}: identity {pid} is in split '{home[pid]}' and in '{split}': a person "
                "seen in training must not be tested on"
            )
        captions.setdefault(image, []).append(entry["caption"])
    splits: dict[Split, list[Record]] = {split: [] for split in SPLITS}
    for image, (split, pid, camera) in facts.items():
        splits[split].append(Record(root / image, pid, tuple(captions[image]), camera))
    return splits


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not JSON in UTF-8: {error}") from error
            yield number, _checked(entry, f"{path}, line {number}")


def _checked(entry: object, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(entry).__name__}")
    for key, kind in (_REQUIRED | _OPTIONAL).items():
        if key in _REQUIRED and key not in entry:
            raise InputError(f"{where}: key '{key}' is missing, found {', '.join(entry) or 'none'}")
        # bool is an int to Python, but never an identity.
        if key in entry and (not isinstance(entry[key], kind) or isinstance(entry[key], bool)):
            raise InputError(f"{where}: '{key}' must be {kind.__name__}, found {entry[key]!r}")
    return entry

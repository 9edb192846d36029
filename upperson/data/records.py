"""Annotated person crops as plain records, and the reader of every data set.

The formats are in `published` and `annotations`; what their entries must satisfy together is
here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from upperson.data.annotations import (
    PLAIN_FORMATS,
    SPLITS,
    AnnotatedSet,
    Annotation,
    Attributes,
    Problem,
    Split,
    open_plain_format,
)
from upperson.data.published import PUBLISHED_SETS
from upperson_rt.errors import UsageError
from upperson_rt.files import refuse_archive
from upperson_rt.printable import get_logger, safe_repr, shortened
from upperson_rt.strict import suggestion

__all__ = [
    "DATASETS",
    "SPLITS",
    "Record",
    "Split",
    "collect_records",
    "open_dataset",
    "read_dataset",
]

DATASETS = (*PUBLISHED_SETS, *PLAIN_FORMATS)
"""Names for ``--dataset``."""


@dataclass(frozen=True, slots=True)
class Record:
    """One crop with its captions."""

    image: Path
    """Image file, absolute or relative to the working directory."""

    pid: int
    """Identity: equal for images of the same person within a split."""

    captions: tuple[str, ...]
    """At least one sentence."""

    camera: str | None = None

    attributes: Attributes | None = None
    """What is true of the person in this picture; None where the data set does not say."""


def read_dataset(name: str, root: Path) -> dict[Split, list[Record]]:
    """Read a data set; images are not opened.

    A caption that is empty is left out if its record has another one, and a warning is logged. It
    is an error if the record has no other: in the project's own formats that is every empty one.

    Args:
        name: One of `DATASETS`, in any case.
        root: Its folder; for the published sets also the folder that holds it.

    Raises:
        UsageError: The name is unknown.
        InputError: The data set is not there or an entry cannot be used; the first one is named.
            Entries with one image must agree in split, identity, camera and attributes. An identity
            must not be in two splits, except where numbers mean people only within a split
            (ICFG-PEDES) or mean images (Flickr30K, MSCOCO).
    """
    annotated = open_dataset(name, root)
    left_out: list[Problem] = []

    def refuse_errors(problem: Problem) -> None:
        if problem.severity == "error":
            raise problem.as_error()
        if problem.kind == "empty_caption":
            left_out.append(problem)

    splits = collect_records(annotated, refuse_errors)
    if left_out:
        get_logger(__name__).warning(
            "%d records have an empty caption, which is left out; the first: %s",
            len(left_out),
            left_out[0].text,
        )
    return splits


def open_dataset(name: str, root: Path) -> AnnotatedSet:
    """Find a data set without reading its entries; arguments and errors as for `read_dataset`."""
    refuse_archive(root, "the folder of a data set")
    lower = name.lower()
    if lower in PUBLISHED_SETS:
        return PUBLISHED_SETS[lower].open(root)
    if lower in PLAIN_FORMATS:
        return open_plain_format(lower, root)
    raise UsageError(
        f"data set format {safe_repr(name)} is unknown, {suggestion(lower, DATASETS)}",
        code="dataset_unknown",
        dataset=name,
        suggestion=suggestion(lower, DATASETS),
    )


def collect_records(
    annotated: AnnotatedSet, on_problem: Callable[[Problem], None]
) -> dict[Split, list[Record]]:
    """Read all entries, which uses them up, and put together the captions of each image.

    After a problem that does not raise, an entry that has no caption or contradicts an earlier one
    is left out; others are kept, in file order.
    """
    earlier = _EarlierEntries(annotated)
    records: dict[str, tuple[Annotation, list[str]]] = {}
    for entry in annotated.entries:
        if isinstance(entry, Problem):
            on_problem(entry)
            continue
        problems = list(earlier.compare(entry))
        for problem in problems:
            on_problem(problem)
        if any(problem.kind in ("no_caption", "conflicting_image") for problem in problems):
            continue
        key = entry.image if annotated.several_entries_per_image else entry.where
        records.setdefault(key, (entry, []))[1].extend(_texts(entry))
    splits: dict[Split, list[Record]] = {split: [] for split in SPLITS}
    for entry, texts in records.values():
        image = annotated.image_folder / entry.image
        splits[entry.split].append(
            Record(image, entry.pid, tuple(texts), entry.camera, entry.attributes)
        )
    return splits


class _EarlierEntries:
    """The entries read so far, which a new one must agree with."""

    def __init__(self, annotated: AnnotatedSet) -> None:
        self._annotated = annotated
        self._first: dict[str, Annotation] = {}  # By image.
        self._texts: dict[str, set[str]] = {}  # By image.
        self._home: dict[int, Split] = {}  # By identity.
        self._reported: set[int] = set()

    def compare(self, entry: Annotation) -> Iterator[Problem]:
        """Yield what is wrong with an entry, and remember it."""
        where, image, texts = entry.where, entry.image, _texts(entry)
        name = shortened(image)
        if not texts:
            text = f"{where}: the caption is empty: write one or delete the record"
            yield Problem("no_caption", "error", text, where)
            return
        if len(texts) < len(entry.captions):
            yield Problem("empty_caption", "warning", f"{where}: a caption of '{name}' is empty")
        first = self._first.setdefault(image, entry)
        conflict = ""
        if _facts(first) != _facts(entry):
            conflict = (
                f"had (split, pid, camera) {_facts(first)} before and has {_facts(entry)} here: "
                "one image is one person in one split"
            )
        elif first.attributes != entry.attributes:
            conflict = (
                f"had other attributes in {first.where}: all lines of one image have the same"
            )
        if conflict:
            text = f"{where}: image '{name}' {conflict}"
            yield Problem("conflicting_image", "error", text, where)
            return
        yield from self._compare_identity(entry)
        known = self._texts.setdefault(image, set())
        duplicate = ""
        if not self._annotated.several_entries_per_image:
            duplicate = f"image '{name}' is also in {first.where}" if known else ""
        elif not known.isdisjoint(texts):
            duplicate = f"'{name}' had this caption before"
        if duplicate:
            yield Problem("duplicate_record", "warning", f"{where}: {duplicate}")
        known.update(texts)

    def _compare_identity(self, entry: Annotation) -> Iterator[Problem]:
        severity, pid = self._annotated.id_in_two_splits, entry.pid
        home = self._home.setdefault(pid, entry.split)
        if severity is None or home == entry.split or pid in self._reported:
            return
        self._reported.add(pid)
        meaning = (
            "a person seen in training must not be tested on"
            if severity == "error"
            else "numbers mean people only within a split here"
        )
        yield Problem(
            "id_in_two_splits",
            severity,
            f"{entry.where}: identity {pid} is in split '{home}' and in '{entry.split}': {meaning}",
            entry.where,
        )


def _texts(entry: Annotation) -> list[str]:
    return [text for text in entry.captions if text.strip()]


def _facts(entry: Annotation) -> tuple[Split, int, str | None]:
    return entry.split, entry.pid, entry.camera

"""Checking a data set: all that would stop training or make its numbers wrong, in one go."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upperson.data.annotations import SPLITS, Counts, Problem, ProblemKind, Severity, Split
from upperson.data.images import find_images, path_text, truncated_images
from upperson.data.published import PUBLISHED_SETS, PersonSet
from upperson.data.records import Record, collect_records, open_dataset
from upperson_rt.errors import InputError
from upperson_rt.preprocess import iter_image_files, load_image
from upperson_rt.printable import count_of

EXAMPLES = 5
"""How many problems of a kind are kept in full."""


@dataclass(frozen=True, slots=True)
class Finding:
    """All problems of one kind."""

    kind: ProblemKind
    severity: Severity
    count: int
    examples: tuple[str, ...]
    """The first of them, a line each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckReport:
    """What `check_dataset` found."""

    dataset: str
    files: tuple[Path, ...]
    """Annotation files."""

    image_folder: Path
    images_decoded: bool

    counts: Mapping[Split, Counts]
    """What each split holds; an image that a person set lists twice counts twice."""

    published: Mapping[Split, Counts] | None
    """None for the project's own formats. A split that does not exist is left out."""

    findings: tuple[Finding, ...]
    """Errors first, then warnings, then notes."""

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that make the data set unusable."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {
            "dataset": self.dataset,
            "usable": not self.errors,
            "files": [str(path) for path in self.files],
            "image_folder": str(self.image_folder),
            "images_decoded": self.images_decoded,
            "splits": {
                split: counts._asdict() | {"published": published and published._asdict()}
                for split, counts in self.counts.items()
                for published in [(self.published or {}).get(split)]
            },
            "findings": {
                each.kind: {
                    "severity": each.severity,
                    "count": each.count,
                    "examples": [*each.examples],
                }
                for each in self.findings
            },
        }


def check_dataset(
    name: str,
    root: Path,
    *,
    decode: bool = True,
    progress: Callable[[int, int], None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> CheckReport:
    """Read a data set as training does, but go on after problems, and look at every image.

    Args:
        name: One of `upperson.data.records.DATASETS`, in any case.
        root: As for `upperson.data.records.read_dataset`.
        decode: Decode every image as training does. Else only look whether the file is there.
        progress: Called after every image with the number of images decoded and to decode.
        notify: Called with a line for each image folder that is missing, before images are decoded.

    Raises:
        UsageError: The name is unknown.
        InputError: There is no such data set, or an annotation file as a whole cannot be read.
    """
    name = name.lower()
    annotated = open_dataset(name, root)
    problems: list[Problem] = []
    splits = collect_records(annotated, problems.append)
    records = [record for split in SPLITS for record in splits[split]]
    if not records:
        text = f"{annotated.files[0]} holds no usable record"
        problems.append(Problem("no_records", "error", text))
    counts = {split: _count(splits[split]) for split in SPLITS}
    if annotated.outdated and _people(counts) == annotated.outdated:
        problems.append(Problem("outdated_splits", "warning", _outdated(counts)))
    if annotated.published:
        problems.extend(_differences(counts, annotated.published))
    if annotated.id_in_two_splits is not None:  # Else ids are numbers of images.
        problems.extend(_unused_ids(splits["train"]))
    images = list(dict.fromkeys(record.image for record in records))
    problems.extend(_check_images(images, decode, progress, notify))
    problems.extend(_unlisted_images(annotated.image_folder, images))
    return CheckReport(
        dataset=name,
        files=annotated.files,
        image_folder=annotated.image_folder,
        images_decoded=decode,
        counts=counts,
        published=annotated.published,
        findings=_findings(problems),
    )


def require_published_counts(name: str, root: Path, splits: Mapping[Split, list[Record]]) -> None:
    """Raise InputError where a published set is not as large as it was published."""
    published = PUBLISHED_SETS.get(name.lower())
    if published is None:
        return
    counts = {split: _count(splits[split]) for split in SPLITS}
    differing = [problem.text for problem in _differences(counts, published.counts)]
    if not differing:
        return
    if isinstance(published, PersonSet) and _people(counts) == published.outdated:
        differing = [_outdated(counts)]
    raise InputError(
        f"{name} in {root} is not the published set: {'; '.join(differing)}: get the whole set, or "
        "train on what there is with --allow-partial; its numbers then compare with no published "
        "ones",
        code="counts_differ",
        dataset=name,
        differing=differing,
    )


def _people(counts: Mapping[Split, Counts]) -> dict[Split, int]:
    return {split: found.ids for split, found in counts.items()}


def _outdated(counts: Mapping[Split, Counts]) -> str:
    people = ", ".join(f"{found.ids} people in {split}" for split, found in counts.items())
    return f"{people} are the splits of its first release, which was replaced since"


def _count(records: Sequence[Record]) -> Counts:
    return Counts(
        ids=len({record.pid for record in records}),
        images=len(records),
        captions=sum(len(record.captions) for record in records),
    )


def _differences(
    found: Mapping[Split, Counts], published: Mapping[Split, Counts]
) -> Iterator[Problem]:
    for split in SPLITS:
        expected = published.get(split, Counts(0, 0, 0))
        parts = [
            f"{count} {what} (published: {wanted})"
            for what, count, wanted in zip(Counts._fields, found[split], expected, strict=True)
            if count != wanted
        ]
        if parts:
            yield Problem("counts_differ", "warning", f"split '{split}' has {', '.join(parts)}")


def _unused_ids(records: Sequence[Record]) -> Iterator[Problem]:
    ids = {record.pid for record in records}
    if ids and max(ids) - min(ids) + 1 > len(ids):
        text = f"{len(ids)} ids from {min(ids)} to {max(ids)}; training numbers people anew"
        yield Problem("unused_train_ids", "note", text)


def _check_images(
    images: Sequence[Path],
    decode: bool,
    progress: Callable[[int, int], None] | None,
    notify: Callable[[str], None] | None,
) -> Iterator[Problem]:
    found = find_images(images)
    folders = [
        f"{path_text(folder)}, which {count_of(count, 'image')} should be in"
        for folder, count in found.folders.items()
    ]
    if notify is not None:
        for text in folders[:EXAMPLES]:
            notify(f"image folder missing: {text}")
    yield from (Problem("missing_folder", "error", text) for text in folders)
    for image in found.files:
        yield Problem("missing_image", "error", path_text(image))
    if not decode:
        return
    broken = dict(_broken(found.present, progress))
    # One after the other, since Pillow's switch is for all threads.
    with truncated_images(True):
        for image, text in broken.items():
            kind: ProblemKind = "broken_image" if _error_of(image) else "truncated_image"
            yield Problem(kind, "error", text)


def _error_of(image: Path) -> str:
    """Return why an image cannot be decoded, or an empty text."""
    try:
        load_image(image)
    except InputError as error:
        return str(error)
    return ""


def _broken(
    images: Sequence[Path], progress: Callable[[int, int], None] | None
) -> Iterator[tuple[Path, str]]:
    """Decode all images; yield those that fail, and why."""
    # Threads: Pillow decodes, and files are read, without the interpreter's lock.
    pool = ThreadPoolExecutor()
    try:
        for done, error in enumerate(pool.map(_error_of, images), start=1):
            if progress is not None:
                progress(done, len(images))
            if error:
                yield images[done - 1], error
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest.


def _unlisted_images(folder: Path, images: Iterable[Path]) -> Iterator[Problem]:
    listed = set(images)
    try:
        for path in iter_image_files([folder]):
            if path not in listed:
                yield Problem("unlisted_image", "note", str(path))
    except InputError:
        return  # No folder, or no image in it: every listed image is reported as missing.


def _findings(problems: Iterable[Problem]) -> tuple[Finding, ...]:
    by_kind: dict[tuple[ProblemKind, Severity], list[str]] = defaultdict(list)
    for problem in problems:
        by_kind[problem.kind, problem.severity].append(problem.text)
    order: tuple[Severity, ...] = ("error", "warning", "note")
    return tuple(
        Finding(kind, severity, len(texts), tuple(texts[:EXAMPLES]))
        for (kind, severity), texts in sorted(by_kind.items(), key=lambda at: order.index(at[0][1]))
    )

"""Pictures from files into a gallery, a committed batch at a time."""

import dataclasses
import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice, takewhile
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from upperson_rt.arguments import (
    check_callable,
    check_choice,
    check_count,
    check_list,
    check_object,
)
from upperson_rt.encoder import Encoder, Progress
from upperson_rt.errors import BackendError, InputError, UppersonError
from upperson_rt.gallery import Gallery, Item
from upperson_rt.gallery.records import attributes_as_json, check_new
from upperson_rt.ingest.service import Crop, Ingest, Output, embed_crops
from upperson_rt.preprocess import use_image
from upperson_rt.printable import error_text, get_logger, safe_repr

if TYPE_CHECKING:
    from upperson_rt.ingest.detector import Detector
    from upperson_rt.preprocess import TimeSource

# --- Whether a gallery holds pictures already, under the name of another folder
#
# Keys are paths. The same pictures, found at another mount point, are added once more, and nothing
# else tells: here their names are compared, as far as a sample goes.

_SAMPLE = 1000
_ASKED = 100
"""Pictures that are looked up by the names that they would have."""
_TRIED = 3
"""Pairs of folders that are looked up, likeliest first."""


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """Pictures that a gallery seems to hold under another name."""

    before: str
    """The folder that they have in the gallery."""
    now: str
    """The same folder as it is called now."""
    found: int
    """Of the pictures that were looked up, those that are there by that name."""
    examined: int


def find_elsewhere(
    gallery: Gallery,
    files: Sequence[str | os.PathLike[str]],
    first_keys: Callable[[str], Sequence[str]],
    is_like: Callable[[Item, Path], bool],
) -> Elsewhere | None:
    """Find an indexed folder whose files have the names of the new ones.

    ``first_keys`` returns the keys that a picture at a path may have; ``is_like`` whether an item
    suits a picture otherwise.
    """
    sources = [item.source for item in gallery.sample(_SAMPLE) if item.source is not None]
    known = {end for source in sources for end in _ends(source)}
    by_end: dict[str, str | os.PathLike[str]] = {}
    for file in files:
        for end in takewhile(known.__contains__, _ends(os.fspath(file))):
            by_end.setdefault(end, file)
    folders: Counter[tuple[str, str]] = Counter()
    for source in sources:
        # The last is the longest: of names such as 0001.jpg, that of the same folder.
        for likest in deque(takewhile(by_end.__contains__, _ends(source)), maxlen=1):
            before, now = _apart(PurePath(source), Path(by_end[likest]).absolute())
            folders[before, now] += before != now
    if not folders.total():
        return None
    examined = [Path(file).absolute() for file in files[:: max(1, len(files) // _ASKED)][:_ASKED]]
    own = {file: first_keys(str(file)) for file in examined}
    there = gallery.ids([key for keys in own.values() for key in keys])
    missing = [file for file, keys in own.items() if not there.keys() & set(keys)]
    for (before, now), _ in folders.most_common(_TRIED if missing else 0):
        named = {
            key: file
            for file in missing
            if file.is_relative_to(now)
            for key in first_keys(os.path.join(before, file.relative_to(now)))
        }
        items = [item for item, _ in gallery.get([*gallery.ids([*named]).values()]).values()]
        found = sum(
            is_like(item, named[item.key]) and not _is_other(item.source, named[item.key])
            for item in items
        )
        if 2 * found > len(missing):
            return Elsewhere(before=before, now=now, found=found, examined=len(missing))
    return None


def _ends(path: str) -> Iterator[str]:
    """Yield a file's name, that with its folder before it, and so on."""
    at = len(path)
    while at > 0:
        at = path.rfind(os.sep, 0, at)
        yield path[at + 1 :]


def _is_other(source: str | None, file: Path) -> bool:
    """Return whether a path of the gallery leads to another file on this machine."""
    try:
        return source is None or not os.path.samefile(source, file)
    except (OSError, ValueError):  # It leads nowhere here: it may be another machine's.
        return False


def _apart(source: PurePath, file: PurePath) -> tuple[str, str]:
    """Return the folders that two paths begin with, before all that they end with alike."""
    one, other = source.parts, file.parts
    same = 0
    while same < min(len(one), len(other)) - 1 and one[-1 - same] == other[-1 - same]:
        same += 1
    return str(PurePath(*one[: len(one) - same])), str(PurePath(*other[: len(other) - same]))


# --- Pictures from files into a gallery, a committed batch at a time

_LOG = get_logger(__name__)

_USUAL_WORKERS, _MOST_WORKERS = 4, 256
"""Threads that decode; more than a few only wait for the model."""


@dataclass(frozen=True)
class SkippedImage:
    """A picture that could not be used."""

    path: str
    reason: str


@dataclass
class IndexReport:
    """What `index_images` did."""

    indexed: int = 0
    """Pictures added or replaced."""
    replaced: int = 0
    """Those of them that took the place of an earlier one with the same key."""
    timed: int = 0
    """Those of them that have a time."""
    skipped: list[SkippedImage] = field(default_factory=list)
    wide: int = 0
    """Pictures wider than high that were added whole: a person who stands is not."""
    with_items: int = 0
    """Pictures that gave at least one item: each, without a detector."""
    empty: int = 0
    """Pictures in which the detector found no people."""
    too_small: int = 0
    """People that the detector found, too small to be indexed."""


@dataclass(frozen=True)
class _Labels:
    camera: str | None
    time_from: "TimeSource"
    track_from: Literal["folder", "none"]
    attributes: Mapping[str, str | int | float | bool]

    def check(self) -> None:
        """Raise InputError if no item could have them: else every picture would be skipped."""
        (item,) = check_new([Item(key="any", camera=self.camera, attributes=self.attributes)])
        attributes_as_json(item)

    def item(self, path: str) -> Item:
        from upperson_rt.preprocess import capture_time

        item = Item(
            key=path,
            source=path,
            time=capture_time(path, self.time_from),
            track=Path(path).parent.name or None if self.track_from == "folder" else None,
            camera=self.camera,
            attributes=self.attributes,
        )
        check_new([item])  # Here, where one that cannot be kept does not stop the others.
        return item


@dataclass(frozen=True)
class _Decoded:
    path: str
    crops: Sequence[Crop]
    is_wide: bool = False
    too_small: int = 0


def person_key(path: str, number: int) -> str:
    """Return the key of the n-th person, from 1, in a picture."""
    return f"{path}#person={number}"


def index_images(
    encoder: Encoder,
    gallery: Gallery | Callable[[], Gallery],
    files: Sequence[str | os.PathLike[str]],
    camera: str | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
    *,
    time_from: "TimeSource" = "exif",
    track_from: Literal["folder", "none"] = "none",
    attributes: Mapping[str, str | int | float | bool] | None = None,
    workers: int | None = None,
    detector: "Detector | None" = None,
    outputs: Sequence[Output] = (),
) -> IndexReport:
    """Embed pictures and add them; one that is there already is replaced.

    With a detector each person found in them is an item with a box, best first; a picture that was
    added before gives up the items that it no longer has.

    Each batch is committed before the next one runs: an interruption loses one batch at most.
    While one batch runs, threads decode the next one.

    Args:
        encoder: Whose image tower to use.
        gallery: Opened with the encoder's fingerprint, or a function that makes it, which is called
            before the first commit: without a usable picture none is made.
        files: The pictures; their absolute paths become the keys.
        camera: Name of the camera that took them.
        batch_size: Pictures run and committed at a time.
        progress: Called after each batch.
        time_from: Where the time of a picture comes from, see `TimeSource`.
        track_from: ``folder`` makes the name of a picture's folder its track.
        attributes: Of every picture.
        workers: Threads that decode; None for as many as there are CPUs, 4 at most.
        detector: Finds the people in pictures of whole scenes; None takes a picture for a person.
        outputs: Get the committed rows.

    Returns:
        How many were added, and which could not be read; those do not stop the rest.

    Raises:
        InputError: The gallery cannot be written, or batch_size is below 1.
        UsageError: workers is below 1, or an argument is of another kind.
        BackendError: The image tower cannot be loaded or fails, or the detector wants to end the
            program (``sys.exit``).
        IntegrityError: The image tower gives wrong results, or the gallery is damaged.
    """
    from upperson_rt.preprocess import TimeSource

    batch_size = check_count(batch_size, "batch_size", InputError)
    check_object(encoder, "an encoder", ("encode_pixels", "prepare_image", "variant"))
    store: Gallery | None = None
    if not callable(gallery) or isinstance(gallery, type):
        check_object(gallery, "a gallery", ("add", "delete", "get", "ids", "sample"))
        store = cast(Gallery, gallery)
    if progress is not None:
        check_callable(progress, "progress")
    if detector is not None:
        check_callable(detector, "detector")
    if workers is None:
        workers = min(_USUAL_WORKERS, os.cpu_count() or 1)
    workers = check_count(workers, "workers", most=_MOST_WORKERS)
    files = check_list(files, "files")
    if other := [file for file in files if not isinstance(file, str | os.PathLike)]:
        raise InputError(f"files must be paths, found {safe_repr(other[0])}")
    check_choice(time_from, "time_from", get_args(TimeSource))
    check_choice(track_from, "track_from", ("folder", "none"))
    labels = _Labels(camera, time_from, track_from, attributes or {})
    labels.check()
    ingest = None
    if store is not None:
        _warn_of_others(store, files, labels)
        ingest = Ingest(encoder, store, batch_size, outputs)
    report = IndexReport()
    done = 0
    with closing(_decoded(encoder, files, labels, batch_size, workers, detector)) as batches:
        for batch in batches:
            report.skipped += [one for one in batch if isinstance(one, SkippedImage)]
            usable = [one for one in batch if not isinstance(one, SkippedImage)]
            crops = [crop for one in usable for crop in one.crops]
            if crops:
                items = [crop.item for crop in crops]
                embeds_ND = embed_crops(encoder, crops, batch_size)
                if ingest is None:
                    store = cast(Callable[[], Gallery], gallery)()
                    ingest = Ingest(encoder, store, batch_size, outputs)
                replaced = ingest.commit(crops, embeds_ND)
                ingest.deliver(items, replaced)
                report.replaced += len(replaced)
                report.indexed += len(items)
                report.timed += sum(item.time is not None for item in items)
            if store is not None:
                _delete_outdated(store, usable)
            report.wide += sum(one.is_wide for one in usable)
            report.with_items += sum(bool(one.crops) for one in usable)
            report.empty += sum(not one.crops for one in usable)
            report.too_small += sum(one.too_small for one in usable)
            done += len(batch)
            if progress is not None:
                progress(done, len(files))
    return report


def _warn_of_others(
    gallery: Gallery, files: Sequence[str | os.PathLike[str]], labels: _Labels
) -> None:
    from upperson_rt.preprocess import capture_time

    def first_keys(path: str) -> tuple[str, str]:
        return path, person_key(path, 1)

    def is_like(item: Item, file: Path) -> bool:
        time = capture_time(file, labels.time_from)
        pairs = (item.camera, labels.camera), (item.time, time)
        return all(None in pair or pair[0] == pair[1] for pair in pairs)

    there = find_elsewhere(gallery, files, first_keys, is_like)
    if there is not None:
        _LOG.warning(
            "gallery %s has %d of %d of these pictures by the same names in %s, now they are in "
            "%s: keys are paths, so all are added once more; if they are the same, stop here and "
            "name them as they were named then, for which a link is enough",
            gallery.location,
            there.found,
            there.examined,
            there.before,
            there.now,
        )


def _delete_outdated(gallery: Gallery, usable: Sequence[_Decoded]) -> None:
    """Delete what the pictures gave before and do not give now: people, or the whole scene."""
    owners: dict[str, _Decoded] = {}
    for one in usable:
        # People are numbered without gaps: if the next one is not there, no other is.
        whole = any(crop.item.key == one.path for crop in one.crops)
        first = islice(_keys_given_up(one), 1 if whole else 2)
        owners |= dict.fromkeys(first, one)
    found = gallery.ids(list(owners))
    outdated = {key for known in found for key in _keys_given_up(owners[known])}
    if outdated:
        gallery.delete(sorted(outdated))


def _keys_given_up(decoded: _Decoded) -> Iterator[str]:
    """Yield what a picture may have given before and does not give now: itself, then people."""
    from upperson_rt.ingest.boxes import MOST_BOXES

    kept = {crop.item.key for crop in decoded.crops}
    people = (person_key(decoded.path, number) for number in range(1, MOST_BOXES + 1))
    return (key for key in chain((decoded.path,), people) if key not in kept)


def _decoded(
    encoder: Encoder,
    files: Sequence[str | os.PathLike[str]],
    labels: _Labels,
    batch_size: int,
    workers: int,
    detector: "Detector | None",
) -> Generator[list[_Decoded | SkippedImage], None, None]:
    """Yield batches in order; the one after each is being decoded meanwhile, and no more."""
    find = _take_whole if detector is None else _finder(detector)

    def decode(file: str | os.PathLike[str]) -> _Decoded | SkippedImage:
        path = os.fspath(Path(file).absolute())
        try:
            item = labels.item(path)
            return use_image(path, lambda image: find(item, image, encoder))
        except InputError as error:
            return SkippedImage(path, str(error))

    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        left = iter(files)
        ahead: list[Future[_Decoded | SkippedImage]] = []
        while True:
            now, ahead = ahead, [pool.submit(decode, file) for file in islice(left, batch_size)]
            if now:
                yield [future.result() for future in now]
            elif not ahead:
                return
    finally:
        pool.shutdown(cancel_futures=True)


def _take_whole(item: Item, image: NDArray[np.uint8], encoder: Encoder) -> _Decoded:
    crops = [Crop(item=item, pixels=encoder.prepare_image(image))]
    return _Decoded(item.key, crops, is_wide=image.shape[1] > image.shape[0])


def _finder(detector: "Detector") -> Callable[[Item, NDArray[np.uint8], Encoder], _Decoded]:
    from upperson_rt.ingest.boxes import QualityRules, clean_boxes
    from upperson_rt.ingest.detector import SharedDetector, plugin_boundary

    turns, rules = SharedDetector(detector), QualityRules()

    def find(item: Item, image: NDArray[np.uint8], encoder: Encoder) -> _Decoded:
        height, width = image.shape[:2]

        def failed(error: BaseException) -> UppersonError:
            if isinstance(error, BackendError):
                return error
            if isinstance(error, Exception):
                return InputError(f"the detector fails on {item.key}: {error_text(error)}")
            return BackendError(f"the detector ended on {item.key}: {error_text(error)}")

        with plugin_boundary(failed):
            given = turns.detect(np.ascontiguousarray(image[:, :, ::-1]))
            boxes = clean_boxes(given, width, height)
        best_first = np.argsort(-np.nan_to_num(boxes.scores), kind="stable")
        crops: list[Crop] = []
        too_small = 0
        for row in best_first:
            x0, y0, x1, y1 = box = tuple(boxes.edges[row].tolist())
            if rules.size_problem(y1 - y0, x1 - x0) is not None:
                too_small += 1
                continue
            score = float(boxes.scores[row])
            attributes = {} if np.isnan(score) else {"score": round(score, 4)}
            found = dataclasses.replace(
                item,
                key=person_key(item.key, len(crops) + 1),
                box=box,
                attributes={**item.attributes, **attributes},
            )
            pixels = encoder.prepare_image(image[y0:y1, x0:x1])
            crops.append(Crop(item=found, pixels=pixels))
        return _Decoded(item.key, crops, too_small=too_small)

    return find

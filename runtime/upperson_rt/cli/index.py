"""`upperson-rt index`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import typer

from upperson_rt.arguments import read_attributes
from upperson_rt.cli.groups import OptionGroup, advanced, grouped, option
from upperson_rt.cli.opening import NewGallery, open_announced, open_to_index
from upperson_rt.cli.options import Delivery, Detection, Model, Output, Place
from upperson_rt.cli.output import (
    new_progress,
    print_line,
    print_note,
    print_result,
    print_warning,
)
from upperson_rt.errors import InputError
from upperson_rt.extensions import load_service
from upperson_rt.printable import count_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from upperson_rt.encoder import Encoder
    from upperson_rt.gallery import Gallery
    from upperson_rt.ingest.files import IndexReport
    from upperson_rt.manifest import ImageSection


@dataclass(frozen=True)
class Labels(OptionGroup, panel="Pictures"):
    """What is recorded with each picture."""

    camera: str | None = option(None, "Name of the camera that took the pictures.")
    time_from: Literal["exif", "mtime", "name", "none"] = option(
        "exif",
        "Where the time of a picture comes from: exif, the camera's clock in the file; "
        "name, such as gate_20261124_140000.jpg; mtime, when the file was written. Local time "
        "where the file does not name an offset.",
    )
    track_from: Literal["folder", "none"] = option(
        "none", "folder: the name of its folder is a picture's track."
    )
    attribute: list[str] | None = option(
        None,
        "Attribute of all these pictures, for `query --attribute`; may be given again.",
        metavar="KEY=VALUE",
    )


@dataclass(frozen=True)
class Run(OptionGroup, panel="Pictures"):
    """Which pictures are indexed, and how."""

    skip_bad: bool = option(False, "Exit with 0 even if pictures were unreadable.")
    shard: str | None = advanced(
        None,
        "Index one part of the pictures, such as 3/16 on the third of sixteen machines; "
        "`gallery merge` joins them.",
        metavar="N/OF",
    )
    batch_size: int = advanced(32, "Pictures run and committed at a time.", min=1)


class Part(Protocol):
    """A part of the pictures, and how it is indexed.

    The service ``shard`` makes one of ``--shard`` and the location of the gallery. It returns None
    without ``--shard``, or refuses the gallery.
    """

    def choose(self, paths: Sequence[Path], others: Counter[str]) -> list[Path]:
        """Return the pictures of the part, and count other files as `iter_image_files` does."""

    def index(self, encoder: "Encoder", gallery: "Gallery", **options: Any) -> "IndexReport":
        """Index these pictures with the options of `index_images`."""


@grouped
def index(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Pictures, or folders (with their sub-folders)."),
    ],
    *,
    labels: Labels,
    run: Run,
    detection: Detection,
    model: Model,
    place: Place,
    delivery: Delivery,
    output: Output,
) -> None:
    """Add pictures of people to the gallery; those that are there already are replaced.

    With --detector the pictures are whole scenes: each person that the detector finds is added.

    Unreadable pictures are listed and left out; the command then ends with exit code 3, after
    everything else has been added. Batches are committed one by one, so an interrupted run keeps
    what it has done.

    With --shard each of several machines takes a part of the pictures, by their names below the
    folder. All need the same pictures and number of shards; `gallery merge` proves that the parts
    are complete.

    Example: `upperson-rt index crops/ --camera gate --time-from name`
    """
    from upperson_rt.ingest.files import index_images
    from upperson_rt.preprocess import describe_others, iter_image_files

    options: dict[str, Any] = {
        "camera": labels.camera,
        "time_from": labels.time_from,
        "track_from": labels.track_from,
        "attributes": read_attributes(labels.attribute, "--attribute"),
    }
    part: Part | None = load_service("shard")(run.shard, place.gallery)
    detection.require_no_options()
    if detection.detector is not None:
        options["detector"] = open_announced(
            detection.detector,
            detection.detector_layout,
            detection.detector_class,
            detection.detector_score,
            model.threads,
            "pictures",
            detection.detector_input,
        )
    others: Counter[str] = Counter()
    files = list(iter_image_files(paths, others)) if part is None else part.choose(paths, others)
    with (
        delivery.opened() as outputs,
        open_to_index(model, place.gallery) as (opened, running, store),
    ):
        options |= {"batch_size": run.batch_size, "outputs": outputs}
        with _shown(len(files)) as progress:
            options["progress"] = progress
            if part is None:
                report = index_images(opened.encoder(), store, files, **options)
            else:
                own = store() if isinstance(store, NewGallery) else store  # Its record comes first.
                report = part.index(opened.encoder(), own, **options)
        made = store.made if isinstance(store, NewGallery) else store
        total = 0 if made is None else made.count()

    _print_notes(report, len(files), run.skip_bad, options, opened.manifest.image)
    result = {
        "shard": run.shard,
        "indexed": report.indexed,
        "replaced": report.replaced,
        "timed": report.timed,
        "wide": report.wide,
        "empty": report.empty,
        "too_small": report.too_small,
        "skipped": [asdict(skipped) for skipped in report.skipped],
        "others": dict(others),
        "gallery": place.gallery,
        "items": total,
        "bundle": str(model.bundle),
        "variant": opened.variant,
        "backend": running.name,
        "device": running.device,
    }
    if others:
        print_note(f"left out of the folders: {describe_others(others)}")
    pictures = count_of(len(files), "picture")
    found = f" in {pictures}" if detection.detector else ""
    print_result(
        result, output.as_json, lambda result: _print_indexed(result, found, made is not None)
    )
    if report.skipped and not run.skip_bad:
        problem = (
            f"{len(report.skipped)} of {pictures} could not be used (listed above), the others are "
            "in the gallery; --skip-bad accepts that"
        )
        if len(report.skipped) == len(files):
            one = report.skipped[0].reason
            all_of_them = f"none of {pictures} could be used (listed above)"
            problem = f"nothing was indexed: {one if len(files) == 1 else all_of_them}"
        raise InputError(
            problem,
            code="pictures_skipped",
            skipped=len(report.skipped),
            pictures=len(files),
        )


@contextmanager
def _shown(files: int) -> "Iterator[Callable[[int, int], None]]":
    """Show progress; after Ctrl-C, say what stays."""
    done = 0
    with new_progress(time_left=True) as bar:
        task = bar.add_task("indexing", total=files)

        def update(now: int, _: int) -> None:
            nonlocal done
            done = now
            bar.update(task, completed=now)

        try:
            yield update
        except KeyboardInterrupt:
            what = "is done and stays" if done == 1 else "are done and stay"
            print_note(f"{done} of {count_of(files, 'picture')} {what} in the gallery")
            raise


def _print_notes(
    report: "IndexReport",
    files: int,
    skip_bad: bool,
    options: Mapping[str, Any],
    image: "ImageSection",
) -> None:
    pictures = count_of(files, "picture")
    for skipped in report.skipped if files > 1 or skip_bad else ():  # Else the error says it.
        print_warning(f"skipped: {skipped.reason}")
    without_time = report.indexed - report.timed
    if without_time and options["time_from"] != "none":
        noun = ("person", "people") if "detector" in options else ("picture",)
        print_note(
            f"{without_time} of {count_of(report.indexed, *noun)} "
            f"{'has' if without_time == 1 else 'have'} no time "
            f"(--time-from {options['time_from']}): --since and --until will not find them"
        )
    if report.wide:
        print_warning(
            f"{report.wide} of {pictures} {'is' if report.wide == 1 else 'are'} wider than high "
            f"and squeezed into {image.width_px} x {image.height_px}: a standing person is not "
            "wide; if they show whole scenes, index them again with  --detector auto  , which "
            "replaces these"
        )
    if report.empty:
        print_note(f"no person was found in {report.empty} of {pictures}")
    if report.too_small:
        from upperson_rt.ingest.boxes import QualityRules

        people = count_of(report.too_small, "person", "people")
        print_note(f"{people} left out: {QualityRules().smallest}")


def _print_indexed(result: dict[str, Any], scenes: str, is_there: bool) -> None:
    noun = ("person", "people") if scenes else ("picture",)
    added = f"{count_of(result['indexed'], *noun)}{scenes}"
    if result["replaced"]:
        added += f", {result['replaced']} in place of earlier ones"
    holds = f"gallery '{result['gallery']}' now holds {result['items']}"
    print_line(f"indexed {added}; {holds if is_there else 'no gallery was made'}")

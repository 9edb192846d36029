"""`upperson-rt index`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from upperson_rt.arguments import read_attributes
from upperson_rt.cli.groups import grouped
from upperson_rt.cli.opening import open_announced, open_store
from upperson_rt.cli.options import (
    DetectorClass,
    DetectorLayout,
    DetectorScore,
    GalleryOption,
    Model,
    Output,
    default_gallery,
    require_no_detector_options,
)
from upperson_rt.cli.output import new_progress, print_json, print_line, print_note, print_warning
from upperson_rt.errors import InputError
from upperson_rt.printable import count_of

__all__ = ["index"]


@grouped
def index(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Pictures, or folders (with their sub-folders)."),
    ],
    *,
    model: Model,
    output: Output,
    gallery: GalleryOption = default_gallery,
    camera: Annotated[
        str | None, typer.Option("--camera", help="Name of the camera that took the pictures.")
    ] = None,
    time_from: Annotated[
        Literal["exif", "mtime", "name", "none"],
        typer.Option(
            "--time-from",
            help="Where the time of a picture comes from: exif, the camera's clock in the file; "
            "name, such as gate_20261124_140000.jpg; mtime, when the file was written. Local time "
            "where the file does not name an offset.",
        ),
    ] = "exif",
    track_from: Annotated[
        Literal["folder", "none"],
        typer.Option("--track-from", help="folder: the name of its folder is a picture's track."),
    ] = "none",
    attribute: Annotated[
        list[str] | None,
        typer.Option(
            "--attribute",
            metavar="KEY=VALUE",
            help="Attribute of all these pictures, for `query --where`; may be given again.",
        ),
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(
            "--detector",
            help="The pictures are whole scenes: add each person that this detector finds in them; "
            "as for `watch`, such as FILE.onnx.",
        ),
    ] = None,
    detector_layout: DetectorLayout = None,
    detector_class: DetectorClass = None,
    detector_score: DetectorScore = None,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="N/OF",
            help="Index one part of the pictures, such as 3/16 on the third of sixteen machines; "
            "`gallery merge` joins them.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Pictures run and committed at a time.")
    ] = 32,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Exit with 0 even if pictures were unreadable.")
    ] = False,
) -> None:
    """Add pictures of people to the gallery; those that are there already are replaced.

    Unreadable pictures are listed and left out; the command then ends with exit code 3, after
    everything else has been added. Batches are committed one by one, so an interrupted run keeps
    what it has done.

    With --shard each of several machines takes the pictures whose names say so, whatever the
    folder is called there. All need the same pictures and number of shards; `gallery merge` proves
    that the parts make a whole.

    Example: `upperson-rt index crops/ --camera gate --time-from name`
    """
    attributes = read_attributes(attribute, "--attribute")
    from upperson_rt.gallery.shards import Shard
    from upperson_rt.ingest.files import index_images
    from upperson_rt.ingest.shards import choose_files, index_shard, record_of, require_whole
    from upperson_rt.preprocess import iter_image_files

    part = None if shard is None else Shard.parse(shard)
    asked = {
        "--detector-layout": detector_layout,
        "--detector-class": detector_class,
        "--detector-score": detector_score,
    }
    people = None
    if detector is None:
        require_no_detector_options(asked)
    else:
        people = open_announced(
            detector, detector_layout, detector_class, detector_score, model.threads, "pictures"
        )
    chosen = None if part is None else choose_files(paths, part)
    if chosen is None:
        require_whole(gallery)
        files = list(iter_image_files(paths))
    else:
        files = chosen.files
        all_of_it = count_of(chosen.whole.count, "picture")
        print_note(f"shard {part}: {chosen.own.count} of {all_of_it}")
    pictures = count_of(len(files), "picture")
    with open_store(model, gallery, "image", create=True) as (opened, running, store):
        with new_progress(time_left=True) as bar:
            task = bar.add_task("indexing", total=len(files))
            try:
                options: dict[str, Any] = {
                    "camera": camera,
                    "batch_size": batch_size,
                    "progress": lambda done, _: bar.update(task, completed=done),
                    "time_from": time_from,
                    "track_from": track_from,
                    "attributes": attributes,
                    "detector": people,
                }
                if chosen is None:
                    report = index_images(opened.encoder(), store, files, **options)
                else:
                    record = record_of(gallery)
                    report, _ = index_shard(opened.encoder(), store, chosen, record, **options)
            except KeyboardInterrupt:
                done = int(bar.tasks[0].completed)
                what = "is done and stays" if done == 1 else "are done and stay"
                print_note(f"{done} of {pictures} {what} in the gallery")
                raise
        total = store.count()
        image = opened.manifest.image

    for skipped in report.skipped:
        print_warning(f"skipped: {skipped.reason}")
    if report.timed < report.indexed and time_from != "none":
        noun = ("picture",) if people is None else ("person", "people")
        print_note(
            f"{report.indexed - report.timed} of {count_of(report.indexed, *noun)} "
            f"{'has' if report.indexed - report.timed == 1 else 'have'} no time "
            f"(--time-from {time_from}): --since and --until will not find them"
        )
    if report.wide:
        print_warning(
            f"{report.wide} of {pictures} "
            f"{'is' if report.wide == 1 else 'are'} wider than high and squeezed into "
            f"{image.width_px} x {image.height_px}: a person who stands is not; if they show whole "
            "scenes, index the people in them with  --detector"
        )
    if report.empty:
        print_note(f"nobody was found in {report.empty} of {pictures}")
    if report.too_small:
        print_note(f"{count_of(report.too_small, 'person', 'people')} left out: too small to tell")
    if output.as_json:
        print_json(
            {
                "shard": shard,
                "indexed": report.indexed,
                "replaced": report.replaced,
                "timed": report.timed,
                "wide": report.wide,
                "empty": report.empty,
                "too_small": report.too_small,
                "skipped": [asdict(skipped) for skipped in report.skipped],
                "gallery": str(gallery),
                "items": total,
                "bundle": str(model.bundle),
                "variant": opened.variant,
                "backend": running.name,
                "device": running.device,
            }
        )
    else:
        added = count_of(report.indexed, "picture")
        if people is not None:
            added = f"{count_of(report.indexed, 'person', 'people')} in {pictures}"
        if report.replaced:
            added += f", {report.replaced} in place of earlier ones"
        print_line(f"indexed {added}; gallery '{gallery}' now holds {total}")
    if report.skipped and not skip_bad:
        others = "" if len(report.skipped) == len(files) else ", the others are in the gallery"
        raise InputError(
            f"{len(report.skipped)} of {pictures} could not be used (listed above){others}; "
            "--skip-bad accepts that"
        )

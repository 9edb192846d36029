"""``upperson data``: make and check data sets."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upperson.cli.options import Dataset, Root
from upperson_rt.cli.app import Command, new_app
from upperson_rt.cli.groups import OptionGroup, grouped, option
from upperson_rt.cli.options import Output
from upperson_rt.cli.output import (
    new_table,
    print_error,
    print_json,
    print_labelled,
    print_line,
    print_table,
)
from upperson_rt.errors import InputError

if TYPE_CHECKING:
    from upperson.data.check import CheckReport

_TITLES = {
    "broken_record": "records that cannot be read",
    "no_caption": "records without a caption",
    "conflicting_image": "records that contradict another one of the same image",
    "id_in_two_splits": "ids in two splits",
    "missing_folder": "image folders that are not there",
    "missing_image": "images that are not there",
    "broken_image": "images that cannot be decoded",
    "truncated_image": "images that end early (training needs --set load_truncated=true)",
    "no_records": "annotation files without a usable record",
    "empty_caption": "empty captions beside others, left out in training",
    "duplicate_record": "records that are there twice",
    "outdated_splits": "splits of an earlier release",
    "counts_differ": "splits of another size than published (training needs --allow-partial)",
    "unused_train_ids": "gaps in the numbers of train",
    "unlisted_image": "images that no record names",
}
_COLOURS = {"error": typer.colors.RED, "warning": typer.colors.YELLOW, "note": typer.colors.BLUE}

app = new_app("Make and check data sets.")


@dataclass(frozen=True)
class People(OptionGroup, panel="People"):
    """A synthetic data set."""

    look: str = option("street", "studio, indoor or street.")
    train_ids: int = option(500, "People in the train split.", min=0)
    val_ids: int = option(100, "People in the val split.", min=0)
    test_ids: int = option(300, "People in the test split.", min=0)
    views: int = option(4, "Pictures of each person.", min=1)
    seed: int = option(0, "Equal seeds give equal files.", min=0)


@app.command(cls=Command)
@grouped
def synthesize(
    output: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder to write.", show_default=False)
    ],
    people: People,
    report: Output,
) -> None:
    """Render synthetic people with captions, in the project's jsonl format.

    Example: `upperson data synthesize people --look street --train-ids 500`
    """
    from upperson.cli.progress import Display
    from upperson_synthetic import SyntheticSpec, write_dataset

    with Display() as display:
        progress = partial(display.update, "rendering people")
        write_dataset(output, SyntheticSpec(**asdict(people)), progress)
    count = people.train_ids + people.val_ids + people.test_ids
    images = count * people.views
    if report.as_json:
        print_json({"root": str(output), "images": images})
    else:
        print_line(f"{images} images of {count} people in {output}")


@dataclass(frozen=True)
class Video(OptionGroup, panel="Video"):
    """A synthetic video."""

    people: int = option(8, "People crossing the view.", min=1)
    seconds: float = option(20.0, "Length of the video.", "--duration", min=0.1)
    fps: float = option(10.0, "Frames a second.", min=0.1)
    width: int = option(960, "Of a frame in pixels.", min=96)
    height: int = option(540, "Of a frame in pixels.", min=96)
    seed: int = option(0, "Equal seeds draw the same people.", min=0)


@app.command("synthesize-video", cls=Command)
@grouped
def synthesize_video(
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT.avi", help="Video to write.", show_default=False)
    ],
    video: Video,
    report: Output,
) -> None:
    """Draw a video of synthetic people crossing a street, to try out `upperson-rt watch`.

    Beside it goes a .json file of the same name with each person's captions and true boxes in every
    frame. Detectors made for photographs may miss drawn people; `--detector OUTPUT.json` uses these
    boxes instead.

    Example: `upperson data synthesize-video street.avi --people 8 --duration 20`
    """
    from upperson.cli.progress import Display
    from upperson_synthetic.video import VideoSpec, write_video

    spec = VideoSpec(**asdict(video))
    with Display() as display:
        write_video(output, spec, partial(display.update, "drawing frames"))
    truth = output.with_suffix(".json")
    if report.as_json:
        print_json({"video": str(output), "boxes": str(truth), "frames": spec.frames})
    else:
        print_line(f"{spec.frames} frames with {video.people} people in {output}; boxes in {truth}")


@app.command(cls=Command)
@grouped
def check(
    root: Root,
    dataset: Dataset = "jsonl",
    images: Annotated[
        bool,
        typer.Option(
            "--images/--no-images",
            help="Decode every image, or only check that the file exists.",
        ),
    ] = True,
    *,
    output: Output,
) -> None:
    """Check a data set before training: records, captions, ids, counts and every image.

    Ends with 3 if there is an error. Counts other than the published ones are a warning: a part of
    a data set may be intended; training then needs --allow-partial.

    Example: `upperson data check --dataset cuhk-pedes --root data`
    """
    from upperson.cli.progress import Display
    from upperson.data.check import check_dataset

    with Display() as display:
        report = check_dataset(
            dataset,
            root,
            decode=images,
            progress=partial(display.update, "decoding images"),
            notify=display.say,
        )
    if output.as_json:
        print_json(report.as_dict())
    else:
        _print_report(report)
    if not report.errors:
        return
    found = ", ".join(f"{_TITLES[error.kind]}: {error.count}" for error in report.errors)
    error = InputError(f"{dataset} in {root} cannot be used as it is: {found}")
    if not output.as_json:
        raise error
    print_error(str(error))  # The report is the one JSON object.
    raise typer.Exit(error.exit_code)


def _print_report(report: "CheckReport") -> None:
    published = report.published
    print_line(f"{report.dataset}: {', '.join(map(str, report.files))}")
    columns = ("split", "ids", "images", "captions")
    table = new_table(*columns, *(("published", "") if published else ()), right=columns[1:])
    for split, counts in report.counts.items():
        row = [split, *map(str, counts)]
        if published:
            expected = published.get(split)
            row.append(" / ".join(map(str, expected)) if expected else "none")
            row.append("ok" if counts == (expected or (0, 0, 0)) else "differs")
        table.add_row(*row)
    print_table(table)
    for finding in report.findings:
        text = f"{_TITLES[finding.kind]}: {finding.count}"
        print_labelled(finding.severity, _COLOURS[finding.severity], text)
        if finding.kind == "counts_differ":
            continue  # The table shows them.
        for example in finding.examples:
            print_line(f"  {example}")
        if finding.count > len(finding.examples):
            print_line(f"  and {finding.count - len(finding.examples)} more")
    if not report.errors:
        looked = "all images decode" if report.images_decoded else "all images are there"
        print_line(f"ok: every record can be read and {looked}")

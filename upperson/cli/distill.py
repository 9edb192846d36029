"""``upperson distill``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upperson.cli.options import require_extra
from upperson_rt.cli.options import Debug, Json
from upperson_rt.cli.output import PlainTable, new_table, print_json, print_line, print_table
from upperson_rt.errors import InputError, UsageError

if TYPE_CHECKING:
    from upperson.config import TrainConfig


def distill(
    teacher: Annotated[
        Path | None, typer.Argument(help="Run to learn from.", metavar="RUN", show_default=False)
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            "--student",
            metavar="BLOCKSxWIDTH[@HEIGHTxWIDTH]",
            help="Its image tower, such as 6x384, or with larger patches 6x384@32x16.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="New run folder.", show_default=False)
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(help="Folder of the data set.", show_default="the teacher's"),
    ] = None,
    pictures: Annotated[
        list[Path] | None,
        typer.Option(
            "--pictures",
            help="More pictures of people, without captions: files and folders.",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the pictures.")] = 30,
    batch_size: Annotated[int, typer.Option(min=2, help="Pictures of a step.")] = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    augment: Annotated[
        bool,
        typer.Option(
            "--augment/--no-augment",
            help="Flip, crop and erase pictures, or only flip them: the teacher is asked once, "
            "which halves the work.",
        ),
    ] = True,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 0,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps pictures decoded and resized.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    resume: Annotated[
        Path | None, typer.Option(help="Folder of an interrupted student.", show_default=False)
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Distil the image tower of a run into a smaller one; the text tower and the space stay.

    The student learns to embed pictures as its teacher does, without captions. Its run evaluates
    and exports like any other. Sentences of the teacher's bundle find pictures of the student's
    gallery, and the other way round, where  upperson-rt query --allow-distilled  permits it.

    Example: `upperson distill runs/mine --student 6x384@32x16 --output runs/small`
    """
    require_extra("train", "distilling")
    from upperson.config import read_config
    from upperson.distill import student_config
    from upperson.run import CONFIG

    if resume is not None:
        if teacher or student or output or root or pictures or cache:
            raise UsageError("--resume takes everything from the run: leave the other options out")
        if not (resume / CONFIG).is_file():
            raise InputError(f"--resume wants the folder of a student, found no {CONFIG} in it")
        _run(read_config(resume / CONFIG), resume, device, as_json, resume=True)
        return
    if teacher is None or student is None or output is None:
        missing = [
            name
            for name, value in (("RUN", teacher), ("--student", student), ("--output", output))
            if value is None
        ]
        raise UsageError(
            f"{' and '.join(missing)} missing, such as:  upperson distill runs/mine --student "
            "3x128 --output runs/small"
        )
    settings: dict[str, Any] = {
        "epochs": epochs,
        "warmup_epochs": min(1, epochs - 1),
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": 0.05,
        "precision": precision,
        "augment": augment,
        "workers": workers,
        "cache": cache and str(cache.absolute()),
        "seed": seed,
    }
    if root is not None:
        settings["root"] = str(root.absolute())
    config = student_config(teacher, student, tuple(pictures or ()), settings)
    _run(config, output, device, as_json, resume=False)


def _run(config: "TrainConfig", run: Path, device: str, as_json: bool, *, resume: bool) -> None:
    from upperson.cli.progress import Display, TrainingDisplay
    from upperson.distill import distill as run_distilling
    from upperson.run import CONFIG, RESULTS

    with Display() as display:
        try:
            observer = TrainingDisplay(display, config.epochs)
            run_distilling(config, run, observer, device=device, resume=resume)
        except KeyboardInterrupt:
            if (run / CONFIG).is_file():
                display.say(f"stopped; go on with:  upperson distill --resume {run}")
            raise
    results: dict[str, Any] = json.loads((run / RESULTS).read_text("utf-8"))
    if as_json:
        print_json({"run": str(run), **results})
        return
    print_table(_table(results))
    print_line(f"run {run}; next:  upperson export {run}")


def _table(results: dict[str, Any]) -> PlainTable:
    """Return student and teacher side by side."""
    facts = results["distilled"]
    names = [name for split in facts["teacher"].values() for name in split]
    columns = ("million operations", *dict.fromkeys(names))
    table = new_table("", *columns, right=columns)
    for split, metrics in facts["teacher"].items() or [("", {})]:
        for who, count, found in (
            ("teacher", facts["teacher_operations"], metrics),
            ("student", facts["operations"], results.get(split) or {}),
        ):
            table.add_row(
                f"{who} {split}".strip(),
                f"{count / 1e6:.1f}",
                *(f"{value:.2f}" for value in found.values()),
            )
    return table

"""``upperson distill``."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upperson.cli.options import TrainingDevice, require_extra
from upperson_rt.cli.groups import OptionGroup, advanced, grouped, option
from upperson_rt.cli.options import Output
from upperson_rt.cli.output import PlainTable, new_table, print_json, print_line, print_table
from upperson_rt.errors import InputError, UsageError

if TYPE_CHECKING:
    from upperson.config import TrainConfig


@dataclass(frozen=True)
class Student(OptionGroup, panel="Student"):
    """The student and its run folder."""

    student: str | None = option(
        None,
        "Its image tower, such as 6x384, or with larger patches 6x384@32x16.",
        metavar="BLOCKSxWIDTH[@HEIGHTxWIDTH]",
        show_default=False,
    )
    output: Path | None = option(None, "New run folder.", show_default=False)
    resume: Path | None = option(None, "Folder of an interrupted student.", show_default=False)
    device: TrainingDevice = "auto"


@dataclass(frozen=True)
class Data(OptionGroup, panel="Data"):
    """The pictures to learn from."""

    root: Path | None = option(None, "Folder of the data set.", show_default="the teacher's")
    images: list[Path] | None = option(
        None, "More pictures of people, without captions: files and folders.", show_default=False
    )
    augment: bool = option(
        True,
        "Flip, crop and erase pictures, or only flip them: the teacher then embeds each "
        "picture once, which halves the work.",
    )
    workers: int = advanced(0, "Processes that decode images.", min=0)
    cache: Path | None = advanced(
        None, "Folder for decoded and resized images.", show_default=False
    )


@dataclass(frozen=True)
class Schedule(OptionGroup, panel="Training"):
    """How long and how fast the student learns."""

    epochs: int = option(30, "Passes over the pictures.", min=1)
    batch_size: int = option(64, "Pictures in a step.", min=2)
    lr: float = option(1e-3, "Peak learning rate.")
    precision: str = advanced("fp32", "fp32, bf16 or fp16.")
    seed: int = advanced(1, "Random seed of the run.", min=0)


@grouped
def distill(
    teacher: Annotated[
        Path | None, typer.Argument(help="Run to learn from.", metavar="RUN", show_default=False)
    ] = None,
    *,
    student: Student,
    data: Data,
    schedule: Schedule,
    output: Output,
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

    if (folder := student.resume) is not None:
        if teacher or student.student or student.output or (data, schedule) != (Data(), Schedule()):
            raise UsageError(
                "--resume takes everything from the run: leave the other options out",
                code="options_beside_resume",
            )
        if not (folder / CONFIG).is_file():
            raise InputError(
                f"--resume wants the folder of a student, found no {CONFIG} in it",
                code="not_a_run",
                path=folder,
            )
        _run(read_config(folder / CONFIG), folder, student.device, output.as_json, resume=True)
        return
    if teacher is None or student.student is None or student.output is None:
        wanted = {"RUN": teacher, "--student": student.student, "--output": student.output}
        missing = [name for name, value in wanted.items() if value is None]
        raise UsageError(
            f"{' and '.join(missing)} missing, such as:  upperson distill runs/mine --student "
            "3x128 --output runs/small",
            code="options_missing",
            missing=missing,
        )
    settings: dict[str, Any] = asdict(schedule) | {
        "warmup_epochs": min(1, schedule.epochs - 1),
        "weight_decay": 0.05,
        "augment": data.augment,
        "workers": data.workers,
        "cache": data.cache and str(data.cache.absolute()),
    }
    if data.root is not None:
        settings["root"] = str(data.root.absolute())
    config = student_config(teacher, student.student, tuple(data.images or ()), settings)
    _run(config, student.output, student.device, output.as_json, resume=False)


def _run(config: "TrainConfig", run: Path, device: str, as_json: bool, *, resume: bool) -> None:
    from upperson.cli.progress import run_shown
    from upperson.distill import distill as run_distilling

    results = run_shown(run_distilling, config, run, device, resume=resume, command="distill")
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
        for tower, count, found in (
            ("teacher", facts["teacher_operations"], metrics),
            ("student", facts["operations"], results.get(split) or {}),
        ):
            table.add_row(
                f"{tower} {split}".strip(),
                f"{count / 1e6:.1f}",
                *(f"{value:.2f}" for value in found.values()),
            )
    return table

"""Remakes what docs show of the console: tables of marks, words and likelihood, and the pictures.

The pictures are of a gallery that `upperson-rt watch` makes here of drawn videos of four cameras;
the test of all pages takes them.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import likelihood, marks, words
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug
from upperson_rt.cli.output import print_line
from upperson_rt.errors import InputError

_CAMERAS = {
    "gate": (1, 40, "2026-11-26T06:05:00"),
    "hall": (1, 50, "2026-11-26T06:31:10"),
    "yard": (2, 40, "2026-11-26T05:12:40"),
    "stairs": (3, 30, "2026-11-25T17:48:00"),
}
"""Seed of the people, seconds, start: who crosses the gate crosses the hall, too."""
_PICTURES = (
    "console-found-narrow-dark.png", "console-found-wide-light.png", "console-person-wide-dark.png",
)  # fmt: skip
_ROOT = Path(__file__).parents[1]

app = new_app("Remake what docs show of the console.")


@app.command(cls=Command)
def console_page(
    demo: Annotated[Path, typer.Argument(metavar="DEMO", help="Folder of  upperson demo.")],
    docs: Annotated[Path, typer.Option("--docs", help="Folder of the pages.")] = Path("docs"),
    debug: Debug = False,
) -> None:
    """Measure marks, words and likelihood, draw and watch four cameras, take pictures of the pages.

    Example: `python -m benchmarks.console_page demo`
    """
    people = marks.people_of(demo / "bundle", str(demo / "gallery"), demo / "people")
    replace_table(docs / "console.md", "mAP after clicks", _marks_rows(marks.measured(people)))
    replace_table(docs / "benchmarks.md", "asked with", _words_rows(words.measured(people)))
    replace_table(docs / "onvif.md", "said", likelihood.rows_of(likelihood.measured(people)))
    print_line(f"the tables in {docs} are those of {demo}")
    with tempfile.TemporaryDirectory() as folder:
        _watch(demo / "bundle", Path(folder))
        _take_pictures(Path(folder), docs)
    print_line(f"look at  {docs / 'console-found-wide-light.png'}  and the others")


def replace_table(page: Path, first: str, rows: Sequence[Sequence[object]]) -> None:
    """Put rows into the one table of a page whose first heading begins so.

    Raises:
        InputError: There is none, or another one as well.
    """
    text = page.read_text("utf-8")
    table = re.compile(rf"(^\| {re.escape(first)}.*\n\|[-|]+\n)(?:\|.*\n)+", re.MULTILINE)
    lines = "".join("| " + " | ".join(map(str, row)).rstrip() + " |\n" for row in rows)
    made, count = table.subn(lambda found: found[1] + lines.replace("|  |", "| |"), text)
    if count != 1:
        raise InputError(f"expected one table that begins '{first}' in {page}, found {count}")
    page.write_text(made, "utf-8")


def _marks_rows(result: dict[str, Any]) -> list[list[object]]:
    rows: list[list[object]] = []
    ways = ("marking the first right one seen, else the first", "marking strictly from the top")
    for way, text in zip(marks.WAYS, ways, strict=True):
        weights = "" if rows else " (1, 0.75, 0.15)"
        for rule, name in (("ours", text), ("Rocchio", f"the same with Rocchio's rule{weights}")):
            rows.append([name, *(f"{v:.1f}" for v in result["map"][f"{rule}, marking {way}"])])
    return rows


def _words_rows(result: dict[str, Any]) -> list[list[object]]:
    rows: list[list[object]] = []
    for asked, share in words.ASKED.items():
        for size in words.SIZES:
            found = result[f"{asked}, {size:,}"]
            right, others, itself = (", ".join(map(str, percent)) for percent in found.values())
            name = asked if size == words.SIZES[0] else ""
            rows.append([name, f"{size:,}", right, others, itself if share == 1 else ""])
    return rows


def _watch(bundle: Path, folder: Path) -> None:
    shutil.copytree(bundle, folder / "bundle")
    for camera, (seed, seconds, start) in _CAMERAS.items():
        drawn = ("--people", "14", "--seconds", seconds, "--fps", "6", "--seed", seed)
        video = ("data", "synthesize-video", f"{camera}.avi", *drawn)
        _run("upperson.cli", folder, *video, "--width", "720", "--height", "420")
        watched = ("watch", f"{camera}={camera}.avi", "--detector", f"{camera}.json")
        how = ("--start", start, "--every", "1.2", "--min-height", "48")
        _run("upperson_rt.cli", folder, *watched, *how, "-b", "bundle", "-g", "gallery")


def _run(module: str, folder: Path, *arguments: object) -> None:
    command = [sys.executable, "-c", f"from {module} import main; main()", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{' '.join(map(str, arguments))}: {done.stderr.strip()}")


def _take_pictures(shown: Path, docs: Path) -> None:
    taken = shown / "pictures"
    taken.mkdir()
    test = ["tests/cli/test_console_browser.py", "-q", "-n", "0", "-k", "readable"]
    told = {
        "UPPERSON_TEST_SCREENSHOTS": str(taken),
        "UPPERSON_TEST_SHOWN": str(shown),
        "UPPERSON_TEST_BROWSER": "required",
    }
    done = subprocess.run([sys.executable, "-m", "pytest", *test], cwd=_ROOT, env=os.environ | told)
    absent = [name for name in _PICTURES if not (taken / name).exists()]
    if absent or done.returncode not in (0, 5):
        raise InputError(f"the pictures could not be taken: {', '.join(absent) or 'see above'}")
    for name in _PICTURES:
        shutil.copyfile(taken / name, docs / name)


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.console_page")

"""The folder that ``upperson demo`` writes, and owns."""

import json
from pathlib import Path

from upperson_rt.errors import InputError

SUMMARY = "summary.json"
PEOPLE = "people"
BUILDING = "building"
PARTS = ("bundle", "gallery", "sites", "sites.png", "answer.png", "report.html", SUMMARY)
"""What the demo puts into its folder beside the people; the summary comes last."""


def require_own_folder(output: Path) -> None:
    """Refuse a folder that holds anything but an earlier demo, finished or not."""
    if not output.exists():
        return
    if not output.is_dir():
        raise InputError(
            f"{output} is a file: choose a folder with --output", code="not_a_folder", path=output
        )
    names = {path.name for path in output.iterdir() if not path.name.startswith(f".{BUILDING}.")}
    if SUMMARY in names:
        try:
            summary = json.loads((output / SUMMARY).read_text("utf-8"))
        except (OSError, ValueError):
            summary = None
        # The demo of one street, of earlier versions, had no sites.
        finished = isinstance(summary, dict) and not summary.keys().isdisjoint(
            {"sites", "zero_shot"}
        )
    else:
        # Stopped before its end: the people may be there, and nothing else, unless it was putting
        # its results in place: then the summary, which comes last, waits to be.
        placing = any(output.glob(f".{BUILDING}.*.tmp/{SUMMARY}"))
        finished = names <= {PEOPLE, *(PARTS if placing else ())} and all(
            (people / "dataset.json").is_file() for people in (output / PEOPLE).glob("[!.]*")
        )
    if not finished:
        raise InputError(
            f"{output} exists and is not an earlier demo (no {SUMMARY} of one in it): "
            "choose another --output",
            code="not_a_demo",
            path=output,
        )

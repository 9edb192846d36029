"""Output of the commands: results on stdout, everything else on stderr."""

import datetime
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from upperson_rt.bundle import Bundle
    from upperson_rt.gallery import Hit, Item
    from upperson_rt.towers import Tower

__all__ = [
    "backend_line",
    "json_from_hit",
    "local_time",
    "new_table",
    "print_hits",
    "print_json",
    "print_note",
    "print_result",
    "print_table",
    "print_warning",
    "short_path",
    "show_progress",
]

_PIPE_WIDTH = 4096


def print_json(result: dict[str, Any]) -> None:
    """Print the one JSON object of a command."""
    # In ASCII: file names need not be text, and the terminal's encoding may be any.
    typer.echo(json.dumps(result, indent=2))


def print_note(text: str) -> None:
    """Print a line about what is going on, on stderr."""
    typer.echo(text, err=True)


def print_warning(text: str) -> None:
    """Print a warning on stderr."""
    typer.secho("warning: ", fg=typer.colors.YELLOW, bold=True, err=True, nl=False)
    typer.echo(text, err=True)


def print_result(
    result: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]
) -> None:
    """Print a benchmark's result: for machines, or with ``show`` and then as one line of JSON."""
    if as_json:
        print_json(result)
    else:
        show(result)
        typer.echo(json.dumps(result, separators=(",", ":")))


@contextmanager
def show_progress() -> Iterator[Callable[[str, float, float], None]]:
    """Give a function that shows what is being done, how far it is, and of how much.

    On a terminal one line is redrawn; elsewhere a line is printed when the work changes or ends.
    """
    console = Console(stderr=True)
    last = ""

    def update(work: str, done: float, total: float) -> None:
        nonlocal last
        line = f"{work}: {done:.0f}/{total:.0f}"
        if console.is_terminal:
            status.update(Text(line))
        elif work != last or done >= total:
            print_note(line)
        last = work

    with console.status("starting") as status:
        if not console.is_terminal:
            status.stop()
        yield update


def new_table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """Return a table in the house style; long cells fold, nothing is cut off."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def print_table(table: Table) -> None:
    """Print a table on stdout; one line a row where a program reads it."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    console.print(table)


def local_time(unix_seconds: float | None) -> str:
    """Return ``2026-11-24 14:00:00`` in local time, or nothing."""
    if unix_seconds is None:
        return ""
    return datetime.datetime.fromtimestamp(unix_seconds).strftime("%Y-%m-%d %H:%M:%S")


def short_path(path: str) -> Text:
    """Return a path relative to the working folder where it lies inside; never as markup."""
    full = Path(path)
    if full.is_absolute() and full.is_relative_to(Path.cwd()):
        full = full.relative_to(Path.cwd())
    return Text(str(full))


def backend_line(bundle: "Bundle", tower: "Tower") -> str:
    """Return what really runs a tower, and how it came to be chosen; it is loaded if need be."""
    running, choice = bundle.backend(tower), bundle.choice(tower)
    return f"backend: {running.name} {running.version} on {running.device} ({choice.why})"


def print_hits(hits: "Sequence[Hit]") -> None:
    """Print a table; a column that is empty for all hits is left out."""
    columns: dict[str, list[Any]] = {
        "rank": [str(rank) for rank in range(1, len(hits) + 1)],
        "score": [f"{hit.score:.3f}" for hit in hits],
        "camera": [hit.item.camera or "" for hit in hits],
        "time": [local_time(hit.item.time) for hit in hits],
        "track": [hit.item.track or "" for hit in hits],
        "pictures": ["" if hit.span is None else str(hit.span.pictures) for hit in hits],
        "from": [local_time(hit.span.first_time) if hit.span else "" for hit in hits],
        "to": [local_time(hit.span.last_time) if hit.span else "" for hit in hits],
        "picture": [short_path(_picture(hit.item)) for hit in hits],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    table = new_table(*shown, right=("rank", "score", "pictures"))
    for row in zip(*shown.values(), strict=True):
        table.add_row(*row)
    print_table(table)


def json_from_hit(rank: int, hit: "Hit") -> dict[str, Any]:
    """Return all that is known of a hit as plain values."""
    item, span = hit.item, hit.span
    return {
        "rank": rank,
        "score": hit.score,
        "id": hit.id,
        "key": item.key,
        "source": item.source,
        "camera": item.camera,
        "time": item.time,
        "track": item.track,
        "span": None
        if span is None
        else {
            "first_time": span.first_time,
            "last_time": span.last_time,
            "pictures": span.pictures,
        },
        "box": item.box,
        "crop": item.crop,
        "attributes": dict(item.attributes),
    }


def _picture(item: "Item") -> str:
    return item.crop or item.source or item.key

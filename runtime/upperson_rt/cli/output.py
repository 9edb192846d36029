"""Output of the commands: results on stdout, everything else on stderr.

Commands print only by these functions, which the linter enforces: they escape what a terminal would
obey (`upperson_rt.printable`), and take no name for markup.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from upperson_rt.printable import count_of, escape_for_display, local_time

if TYPE_CHECKING:
    from rich.progress import Progress

    from upperson_rt.bundle import Bundle
    from upperson_rt.gallery import Hit, Item, TrackSpan
    from upperson_rt.search.notices import Notice
    from upperson_rt.towers import Backend, Tower


Cell: TypeAlias = "str | tuple[str, str]"
"""Text of a table, perhaps with a style of rich, such as ``bold red``."""

_PIPE_WIDTH = 4096
_LONGEST_MESSAGE = 4000

_messages: logging.Logger | None = None
"""Where notes, warnings and errors go instead of stderr; see `messages_to`."""
_has_json = False
"""Whether the command has printed its JSON object."""


@contextmanager
def messages_to(logger: logging.Logger) -> Iterator[None]:
    """Send notes, warnings and errors to a logger, by their level, instead of to stderr."""
    global _messages
    before, _messages = _messages, logger
    try:
        yield
    finally:
        _messages = before


@contextmanager
def one_json_object() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give a function that prints JSON, unless `print_json` was called in the meantime."""
    global _has_json
    _has_json = False
    yield lambda result: None if _has_json else print_json(result)


def print_json(result: dict[str, Any]) -> None:
    """Print the one JSON object of a command."""
    global _has_json
    _has_json = True
    # In ASCII: file names need not be text, and the terminal's encoding may be any.
    typer.echo(json.dumps(result, indent=2))


def print_line(*lines: str) -> None:
    """Print lines of the result on stdout."""
    for line in lines:
        typer.echo(escape_for_display(line))


def print_note(text: str) -> None:
    """Print a note on stderr."""
    if _messages is not None:
        _messages.info("%s", _message(text))
    else:
        typer.echo(_message(text), err=True)


def print_warning(text: str) -> None:
    """Print a warning on stderr."""
    if _messages is not None:
        _messages.warning("%s", _message(text))
    else:
        print_labelled("warning", typer.colors.YELLOW, text, err=True)


def path_or_none(path: Path | None) -> str | None:
    """Return a path as a JSON value."""
    return None if path is None else str(path)


def print_notices(notices: "Sequence[Notice]") -> None:
    """Print the notices of a search on stderr."""
    for notice in notices:
        (print_warning if notice.is_warning else print_note)(notice.text)


def warn_of_pictures_out_of_reach(count: int, total: int, first: str) -> None:
    """Warn if some of so many pictures do not open here, and name the first."""
    if count:
        print_warning(
            f"{count} of {count_of(total, 'picture')} cannot be reached from here, the first is "
            f"{first}: sheets and the console show none until that path leads to it, for which a "
            "link is enough"
        )


def print_error(text: str) -> None:
    """Print an error on stderr."""
    if _messages is not None:
        _messages.error("%s", _message(text))
    else:
        print_labelled("error", typer.colors.RED, text, err=True)


def print_labelled(label: str, colour: str, text: str, err: bool = False) -> None:
    """Print a line that begins with a coloured label, on stdout or stderr."""
    typer.secho(f"{escape_for_display(label)}: ", fg=colour, bold=True, err=err, nl=False)
    typer.echo(_message(text), err=err)


def print_prompt(question: str) -> None:
    """Print a question on stderr, without a line break."""
    typer.echo(f"{_message(question)} ", err=True, nl=False)


def _message(text: str) -> str:
    """Make a message printable, and cut the middle out of a very long one."""
    text = escape_for_display(text)
    half = _LONGEST_MESSAGE // 2
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:half]} ... {text[-half:]}"


def print_result(
    result: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]
) -> None:
    """Print the result of a command: as JSON, or with ``show``."""
    if as_json:
        print_json(result)
    else:
        show(result)


@contextmanager
def show_progress() -> Iterator[Callable[[str, float, float], None]]:
    """Give a function that shows the current work, how much of it is done, and of how much.

    A terminal gets one line that is redrawn; elsewhere a line is printed when work begins or ends.
    """
    console = Console(stderr=True)
    last = ""

    def update(work: str, done: float, total: float) -> None:
        nonlocal last
        line = f"{work}: {done:.0f}/{total:.0f}"
        if console.is_terminal:
            status.update(Text(escape_for_display(line)))
        elif work != last or done >= total:
            print_note(line)
        last = work

    with console.status("starting") as status:
        if not console.is_terminal:
            status.stop()
        yield update


def new_progress(time_left: bool = False) -> "Progress":
    """Return a progress bar with the elapsed or remaining time; hidden if stderr is no terminal.

    `print_note` prints above it.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    class Work(TextColumn):
        def render(self, task: Task) -> Text:
            return Text(escape_for_display(task.description))

    console = Console(stderr=True)
    return Progress(
        Work(""),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn() if time_left else TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class PlainTable:
    """A table without borders; long cells fold."""

    def __init__(self, *columns: str, right: tuple[str, ...] = ()) -> None:
        """Make one without rows; the columns named in ``right`` are right-aligned."""
        self._table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for name in columns:
            self._table.add_column(
                Text(escape_for_display(name)),
                justify="right" if name in right else "left",
                overflow="fold",
            )

    def add_row(self, *cells: Cell) -> None:
        """Add a row."""
        pairs = ((cell, "") if isinstance(cell, str) else cell for cell in cells)
        self._table.add_row(*(Text(escape_for_display(text), style) for text, style in pairs))

    def widen(self, widths: Sequence[int]) -> None:
        """Give each column a minimum width, so that tables below each other line up."""
        for column, width in zip(self._table.columns, widths, strict=True):
            column.min_width = width

    def __rich__(self) -> Table:
        return self._table


new_table = PlainTable


def print_table(table: PlainTable) -> None:
    """Print a table on stdout; one line a row where a program reads it."""
    console = Console(highlight=False, markup=False)
    if console.is_terminal:
        console.print(table)
        return
    console.width = _PIPE_WIDTH
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        typer.echo(line.rstrip())


@contextmanager
def live_display(wanted: bool) -> "Iterator[Callable[[PlainTable | str], None] | None]":
    """Give a function that redraws its argument on stderr; None if stderr is no terminal."""
    console = Console(stderr=True)
    if not (wanted and console.is_terminal):
        yield None
        return
    from rich.live import Live

    with Live(console=console, transient=True, auto_refresh=False) as live:
        yield lambda shown: live.update(
            Text(escape_for_display(shown)) if isinstance(shown, str) else shown, refresh=True
        )


def short_path(path: str) -> str:
    """Return a path relative to the working folder where it lies inside."""
    full = Path(path)
    if full.is_absolute() and full.is_relative_to(Path.cwd()):
        full = full.relative_to(Path.cwd())
    return str(full)


def backend_line(bundle: "Bundle", tower: "Tower") -> str:
    """Return the backend that runs a tower, and why it was chosen; loads it if necessary."""
    running, choice = bundle.backend(tower), bundle.choice(tower)
    return f"backend: {running.name} {running.version} on {running.device} ({choice.why})"


def print_hits(
    hits: "Sequence[Hit]",
    crops_dir: Path | None,
    likelihoods: Sequence[str] = (),
    more: Mapping[str, list[str]] | None = None,
) -> None:
    """Print a table; a column that is empty for all hits is left out.

    ``more`` are columns of numbers before the picture. On a narrow terminal each picture gets a
    line of its own below its row, so that paths and names do not fold and can be copied.
    """
    columns: dict[str, list[str]] = {
        "rank": [str(rank) for rank in range(1, len(hits) + 1)],
        "likelihood": [*likelihoods],
        "score": [f"{hit.score:.3f}" for hit in hits],
        "camera": [hit.item.camera or "" for hit in hits],
        "time": [local_time(hit.item.time) for hit in hits],
        "track": [hit.item.track or "" for hit in hits],
        "pictures": ["" if hit.span is None else str(hit.span.pictures) for hit in hits],
        "period": [_period(hit.span) if hit.span else "" for hit in hits],
        **(more or {}),
        "box": _boxes(hits),
        "picture": [short_path(_picture(hit.item, crops_dir)) for hit in hits],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    print_columns(shown, ("rank", "likelihood", "score", "pictures", *(more or ())), "picture")


def _boxes(hits: "Sequence[Hit]") -> list[str]:
    """Return the box of each hit if several are of one picture; else nothing."""
    sources = [hit.item.source for hit in hits if hit.item.box and not hit.item.crop]
    is_shared = len({*sources}) < len(sources)
    return [str(tuple(hit.item.box)) if is_shared and hit.item.box else "" for hit in hits]


def print_columns(columns: dict[str, list[str]], right: tuple[str, ...], long: str) -> None:
    """Print columns, by their names, as a table; those in ``right`` are aligned to the right.

    On a narrow terminal the cells of ``long`` get lines of their own below their rows.
    """
    table = _table_of(columns, right)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal or _width(table, console) <= console.width:
        print_table(table)
        return
    below = [long, *columns.pop(long)]
    table = _table_of(columns, right)
    console.width = _width(table, console)
    with console.capture() as captured:
        console.print(table)
    for line, cell in zip(captured.get().splitlines(), below, strict=True):
        typer.echo(line.rstrip())
        typer.echo(f"{'':6}{escape_for_display(cell)}")


def _table_of(columns: dict[str, list[str]], right: tuple[str, ...]) -> PlainTable:
    table = new_table(*columns, right=right)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def _width(table: PlainTable, console: Console) -> int:
    unlimited = console.options.update(max_width=sys.maxsize)
    return Measurement.get(console, unlimited, table).maximum


def _period(span: "TrackSpan") -> str:
    first, last = local_time(span.first_time), local_time(span.last_time)
    if first == last:
        return first
    day, _, clock = last.partition(" ")
    return f"{first} to {clock if first.startswith(f'{day} ') else last}"


def json_from_hit(rank: int, hit: "Hit", crops_dir: Path | None) -> dict[str, Any]:
    """Return a hit as JSON values; ``file`` is its picture, None if that does not open here."""
    from upperson_rt.gallery.crops import picture_file

    item, span = hit.item, hit.span
    file = picture_file(item, crops_dir)
    return {
        "rank": rank,
        "score": hit.score,
        "id": hit.id,
        "key": item.key,
        "source": item.source,
        "camera": item.camera,
        "time": item.time,
        "track": item.track,
        "span": None if span is None else asdict(span),
        "box": item.box,
        "crop": item.crop,
        "file": None if file is None else str(file),
        "attributes": dict(item.attributes),
    }


def _picture(item: "Item", crops_dir: Path | None) -> str:
    from upperson_rt.gallery.crops import picture_file

    file = picture_file(item, crops_dir)
    return str(file) if file is not None else item.source or item.crop or item.key


def running_with(variant: str, backend: "Backend") -> dict[str, str]:
    """Return variant, backend and device as part of a result."""
    running = {"backend": backend.name, "version": backend.version, "device": backend.device}
    return {"variant": variant, **running}


def running_line(result: dict[str, Any]) -> str:
    """Return variant, backend and device in one line."""
    return "{variant} on {backend} {version}, {device}".format(**result)

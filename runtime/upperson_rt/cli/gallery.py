"""`upperson-rt gallery ...`."""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from typer.models import CommandInfo

from upperson_rt.cli.app import Command, new_app
from upperson_rt.cli.groups import grouped
from upperson_rt.cli.options import Output, Place
from upperson_rt.cli.output import (
    new_table,
    print_line,
    print_note,
    print_result,
    print_table,
)
from upperson_rt.errors import IntegrityError
from upperson_rt.printable import count_of, local_time

if TYPE_CHECKING:
    from upperson_rt.gallery import IndexInfo


app = new_app("Inspect and maintain a gallery.")
_ORDER = (
    "info", "delete", "prune", "erase-proof", "backup", "restore", "verify", "rebuild", "export",
    "merge",
)  # fmt: skip


def sort_commands() -> None:
    """Bring the commands, also those of other packages, into the order of ``--help``."""
    names = {name: place for place, name in enumerate(_ORDER)}
    app.registered_commands.sort(key=lambda one: names.get(_name_of(one), len(names)))


def _name_of(command: CommandInfo) -> str:
    return command.name or str(getattr(command.callback, "__name__", ""))


@app.command(cls=Command)
@grouped
def info(*, place: Place, output: Output) -> None:
    """Show what a gallery holds; needs no bundle.

    Example: `upperson-rt gallery info -g gallery`
    """
    from upperson_rt.gallery import Gallery

    with Gallery.open(place.gallery) as store:
        found = store.info()
    period = f"{local_time(found.first_time)} to {local_time(found.last_time)}"
    table = new_table("gallery", found.location)
    for name, value in {
        "pictures": str(found.items),
        "cameras": _counts(found.cameras),
        "tracks": str(found.tracks),
        "taken": "unknown" if found.first_time is None else period,
        "variants": _counts(found.variants),
        "dimensions": str(found.embed_dim),
        "model": found.fingerprint,
        "index": _index_line(found.index),
        "size": "unknown" if found.size_bytes is None else f"{found.size_bytes / 1e6:.1f} MB",
        "created": f"{found.created} by {found.generator}, schema {found.schema_version}",
    }.items():
        table.add_row(name, value)
    print_result(asdict(found), output.as_json, lambda _: print_table(table))


@app.command(cls=Command)
@grouped
def verify(*, place: Place, output: Output) -> None:
    """Read a whole gallery and check it, crops included; exit code 6 if anything is wrong.

    Example: `upperson-rt gallery verify -g gallery`
    """
    from upperson_rt.gallery import Gallery
    from upperson_rt.gallery.crops import has_hash

    unchecked = None  # A damaged gallery may not give its items.
    with Gallery.open(place.gallery) as store:
        problems = store.verify()
        items = store.count()
        if not problems:
            crops = (item.crop for item in store.items())
            unchecked = sum(crop is not None and not has_hash(crop) for crop in crops)
    result = {
        "gallery": place.gallery,
        "items": items,
        "ok": not problems,
        "problems": problems,
        "crops_without_hash": unchecked,
    }
    print_result(result, output.as_json, _print_verified)
    if problems:
        for problem in problems:
            print_note(problem)
        raise IntegrityError(
            f"gallery '{place.gallery}' has {count_of(len(problems), 'problem')} (listed above). "
            "Where a line names no command: restore the gallery from a copy, or index those "
            "pictures again",
            code="gallery_damaged",
            problems=len(problems),
        )


def _print_verified(result: dict[str, Any]) -> None:
    if not result["ok"]:
        return
    print_line(f"gallery '{result['gallery']}' is sound: {count_of(result['items'], 'picture')}")
    if unchecked := result["crops_without_hash"]:
        print_note(
            f"the content of {count_of(unchecked, 'crop')} cannot be checked: an older release "
            "or another program saved it, without a hash in its name"
        )


@app.command(cls=Command)
@grouped
def rebuild(*, place: Place, output: Output) -> None:
    """Make the search index anew from the stored vectors, and measure it if it is approximate.

    Worth it after a gallery has grown a lot; `gallery info` shows what is searched beside the
    index. An approximate index keeps the vectors of what was deleted until it is made anew.

    Example: `upperson-rt gallery rebuild -g gallery`
    """
    from upperson_rt.gallery import Gallery

    with Gallery.open(place.gallery) as store:
        began = time.perf_counter()
        store.rebuild()
        seconds = time.perf_counter() - began
        found = store.info()
    index = None if found.index is None else asdict(found.index)
    print_result(
        {"gallery": place.gallery, "items": found.items, "seconds": seconds, "index": index},
        output.as_json,
        lambda _: print_line(f"rebuilt in {seconds:.1f} s: {_index_line(found.index)}"),
    )


def _index_line(index: "IndexInfo | None") -> str:
    if index is None:
        return "none yet: the next search or  upperson-rt gallery rebuild  makes it"
    line = f"{index.kind}, {count_of(index.rows, 'picture')}"
    if index.beside:
        line += f" and {index.beside} newer ones beside it"
    if index.parameters:
        line += "; " + ", ".join(f"{name} {value}" for name, value in index.parameters.items())
    if index.recall_at_10 is not None and index.kind != "exact":
        line += f"; recall@10 {index.recall_at_10:.3f} when it was made"
    return line


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "none given"

"""`upperson-rt gallery ...`."""

import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from upperson_rt.cli.app import Command, new_app
from upperson_rt.cli.options import (
    Attributes,
    Cameras,
    Debug,
    GalleryOption,
    Json,
    Since,
    Track,
    Until,
    default_gallery,
    read_attributes,
)
from upperson_rt.cli.output import (
    local_time,
    new_table,
    print_json,
    print_note,
    print_table,
    print_warning,
)
from upperson_rt.errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from upperson_rt.gallery import Filter, Gallery, IndexInfo

__all__ = ["app", "read_age"]

app = new_app("Look into a gallery, and look after it.")

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only say how many pictures would be deleted.")
]


def read_age(text: str) -> float:
    """Read an age such as ``30d``, ``12h`` or ``1.5w``; return seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if match is None:
        raise typer.BadParameter(
            f"'{text}' is no age: expected a number and s, m, h, d or w, such as 30d"
        )
    return float(match[1]) * _UNIT_SECONDS[match[2]]


@app.command(cls=Command)
def info(
    gallery: GalleryOption = default_gallery, json: Json = False, debug: Debug = False
) -> None:
    """Show what a gallery holds; needs no bundle.

    Example: `upperson-rt gallery info -g gallery`
    """
    from upperson_rt.gallery import Gallery

    with Gallery.open(gallery) as store:
        found = store.info()
    if json:
        print_json(asdict(found))
        return
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
        "size": "not known" if found.size_bytes is None else f"{found.size_bytes / 1e6:.1f} MB",
        "created": f"{found.created} by {found.generator}, schema {found.schema_version}",
    }.items():
        table.add_row(name, Text(value))
    print_table(table)


@app.command(cls=Command)
def delete(
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY...", help="Keys of pictures; for files their paths."),
    ] = None,
    gallery: GalleryOption = default_gallery,
    camera: Cameras = None,
    since: Since = None,
    until: Until = None,
    track: Track = None,
    where: Attributes = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: DryRun = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Delete pictures by key, or all that pass a filter, and their saved crops.

    Example: `upperson-rt gallery delete --camera gate --until 2026-11-01 --dry-run`
    """
    from upperson_rt.gallery import Filter, Gallery

    passing = Filter(
        camera=camera or None,
        since=since,
        until=until,
        track=track,
        attributes=read_attributes(where, "--where"),
    )
    if bool(keys) == (not passing.is_empty):
        raise UsageError("name either keys, or a filter such as --camera gate, to say what goes")
    with Gallery.open(gallery) as store:
        _note_unknown_cameras(store, passing)
        if keys:
            wanted = {str(Path(key).absolute()) if Path(key).exists() else key for key in keys}
            count = sum(item.key in wanted for item in store.items()) if dry_run else len(wanted)
        else:
            count = store.count(passing)
        deleted = 0
        if count and not dry_run:
            _confirm(f"delete {count} pictures from gallery {gallery}?", yes)
            deleted = store.delete(sorted(wanted)) if keys else store.delete_where(passing)
            count = deleted
        left = store.count()
    _report_deleted(gallery, count, deleted, left, dry_run, json)


@app.command(cls=Command)
def prune(
    gallery: GalleryOption = default_gallery,
    older_than: Annotated[
        float | None,
        typer.Option(
            "--older-than",
            parser=read_age,
            metavar="AGE",
            help="Delete pictures taken longer ago than this, such as 30d, 12h or 90m.",
        ),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option("--keep", min=0, metavar="N", help="Keep only the newest N pictures."),
    ] = None,
    camera: Annotated[
        str | None,
        typer.Option("--camera", help="Of this camera only.", show_default="all together"),
    ] = None,
    dry_run: DryRun = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Delete old pictures by age, by number or both, and their saved crops; asks nothing.

    Pictures without a time are never too old, but the first to go where there are too many.

    Example: `upperson-rt gallery prune --older-than 30d --keep 1000000`
    """
    from upperson_rt.gallery import Filter, Gallery
    from upperson_rt.gallery.base import check_prune

    before = None if older_than is None else time.time() - older_than
    check_prune(before, keep)
    with Gallery.open(gallery) as store:
        _note_unknown_cameras(store, Filter(camera=camera))
        count = store.count_prunable(before, keep, camera)
        deleted = 0 if dry_run else store.prune(before, keep, camera)
        left = store.count()
    _report_deleted(gallery, count, deleted, left, dry_run, json)


@app.command(cls=Command)
def verify(
    gallery: GalleryOption = default_gallery, json: Json = False, debug: Debug = False
) -> None:
    """Read a whole gallery and check it; exit code 6 if anything is wrong.

    Example: `upperson-rt gallery verify -g gallery`
    """
    from upperson_rt.gallery import Gallery

    with Gallery.open(gallery) as store:
        problems = store.verify()
        items = store.count()
    if json:
        print_json(
            {"gallery": str(gallery), "items": items, "ok": not problems, "problems": problems}
        )
    elif not problems:
        typer.echo(f"gallery {gallery} is sound: {items} pictures")
    if problems:
        for problem in problems:
            typer.echo(problem, err=True)
        raise IntegrityError(
            f"gallery {gallery} has {len(problems)} problems (listed above): restore it from a "
            "copy, or index those pictures again"
        )


@app.command(cls=Command)
def rebuild(
    gallery: GalleryOption = default_gallery, json: Json = False, debug: Debug = False
) -> None:
    """Make the search index anew from the stored vectors, and measure it if it is approximate.

    Worth it after a gallery has grown a lot; `gallery info` shows what is searched beside the
    index.

    Example: `upperson-rt gallery rebuild -g gallery`
    """
    from upperson_rt.gallery import Gallery

    with Gallery.open(gallery) as store:
        began = time.perf_counter()
        store.rebuild()
        seconds = time.perf_counter() - began
        found = store.info()
    if json:
        index = None if found.index is None else asdict(found.index)
        print_json({"gallery": gallery, "items": found.items, "seconds": seconds, "index": index})
    else:
        typer.echo(f"rebuilt in {seconds:.1f} s: {_index_line(found.index)}")


@app.command(cls=Command)
def export(
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the files go.")],
    gallery: GalleryOption = default_gallery,
    camera: Cameras = None,
    since: Since = None,
    until: Until = None,
    track: Track = None,
    where: Attributes = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write vectors.npy and items.csv; with pyarrow installed also items.parquet.

    Example: `upperson-rt gallery export exported/ --camera gate`
    """
    from upperson_rt.gallery import Filter, Gallery
    from upperson_rt.gallery.export import export_gallery

    passing = Filter(
        camera=camera or None,
        since=since,
        until=until,
        track=track,
        attributes=read_attributes(where, "--where"),
    )
    with Gallery.open(gallery) as store:
        _note_unknown_cameras(store, passing)
        done = export_gallery(store, output, passing)
    names = [path.name for path in done.files]
    if json:
        print_json({"gallery": gallery, "items": done.items, "folder": str(output), "files": names})
    else:
        typer.echo(f"exported {done.items} pictures to {output}: {', '.join(names)}")


def _note_unknown_cameras(store: "Gallery", where: "Filter") -> None:
    """Warn of cameras in a filter that no picture is from."""
    if where.cameras is None:
        return
    known = store.cameras()
    for camera in where.cameras:
        if camera not in known:
            there = ", ".join(known) or "none"
            print_warning(f"no picture is from the camera '{camera}'; cameras: {there}")


def _confirm(question: str, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(f"{question} Add --yes to do it without being asked")
    typer.echo(f"{question} [y/N]: ", err=True, nl=False)  # typer.confirm would use stdout, too.
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise typer.Abort


def _report_deleted(
    gallery: str, count: int, deleted: int, left: int, dry_run: bool, json: bool
) -> None:
    if json:
        print_json(
            {
                "gallery": gallery,
                "dry_run": dry_run,
                "matching": count,
                "deleted": deleted,
                "items": left,
            }
        )
    elif dry_run:
        typer.echo(f"would delete {count} of {left} pictures of gallery {gallery}")
    else:
        typer.echo(f"deleted {deleted} pictures; gallery {gallery} now holds {left}")
    if not json and not count:
        print_note("no picture matches")


def _index_line(index: "IndexInfo | None") -> str:
    if index is None:
        return "none yet: the next search or  upperson-rt gallery rebuild  makes it"
    line = f"{index.kind}, {index.rows} pictures"
    if index.beside:
        line += f" and {index.beside} newer ones beside it"
    if index.parameters:
        line += "; " + ", ".join(f"{name} {value}" for name, value in index.parameters.items())
    if index.recall_at_10 is not None and index.kind != "exact":
        line += f"; recall@10 {index.recall_at_10:.3f} when it was made"
    return line


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "none given"

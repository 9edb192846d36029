"""`upperson-rt gallery ...`."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upperson_rt.cli.app import Command, new_app
from upperson_rt.cli.gallery_backup import backup, restore
from upperson_rt.cli.gallery_delete import delete, prune
from upperson_rt.cli.gallery_erase import erase_proof
from upperson_rt.cli.groups import grouped
from upperson_rt.cli.options import Output, Place, Where
from upperson_rt.cli.output import (
    new_progress,
    new_table,
    print_line,
    print_note,
    print_notices,
    print_result,
    print_table,
    print_warning,
    warn_of_pictures_out_of_reach,
)
from upperson_rt.errors import IntegrityError, UsageError
from upperson_rt.printable import count_of, local_time
from upperson_rt.search.notices import unknown_cameras

if TYPE_CHECKING:
    from upperson_rt.gallery import IndexInfo


app = new_app("Inspect and maintain a gallery.")


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


app.command(cls=Command)(delete)
app.command(cls=Command)(prune)
app.command(cls=Command)(erase_proof)
app.command(cls=Command)(backup)
app.command(cls=Command)(restore)


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


@app.command(cls=Command)
@grouped
def export(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the files go.")],
    *,
    place: Place,
    where: Where,
    output: Output,
) -> None:
    """Write vectors.npy and items.csv; with pyarrow installed also items.parquet.

    Example: `upperson-rt gallery export exported/ --camera gate`
    """
    from upperson_rt.gallery import Gallery
    from upperson_rt.gallery.export import export_gallery

    passing = where.as_filter()
    with Gallery.open(place.gallery) as store:
        print_notices(unknown_cameras(store, passing))
        done = export_gallery(store, folder, passing)
    names = [path.name for path in done.files]
    exported = f"exported {count_of(done.items, 'picture')} to {folder}: {', '.join(names)}"
    print_result(
        {"gallery": place.gallery, "items": done.items, "folder": str(folder), "files": names},
        output.as_json,
        lambda _: print_line(exported),
    )


@app.command(cls=Command)
@grouped
def merge(
    shards: Annotated[
        list[str],
        typer.Argument(metavar="SHARD...", help="Galleries that `index --shard` has made."),
    ],
    *,
    place: Place,
    output: Output,
) -> None:
    """Join all shards of a set of pictures into a new gallery, and prove that it is complete.

    The shards must be all parts of one list, each once and finished. Every row is checked when it
    is read, and the new gallery is read back and compared before it gets its name: it has each row
    of the shards once, or there is none. The shards stay as they are.

    Example: `upperson-rt gallery merge shards/* -g gallery`
    """
    from upperson_rt.gallery.sqlite.merge import merge_shards

    for location in (place.gallery, *shards):
        if "://" in location:
            raise UsageError(
                f"merge joins galleries in folders into one in a folder, not {location}: shards "
                "can be indexed into a collection of Milvus directly",
                code="gallery_not_a_folder",
                gallery=location,
            )
    with new_progress(time_left=True) as bar:
        task = bar.add_task("merging", total=None)
        done = merge_shards(
            shards,
            Path(place.gallery),
            progress=lambda rows, total: bar.update(task, completed=rows, total=total),
        )
    for shard, _, reason in done.skipped:
        print_warning(f"shard {shard} skipped: {reason}")
    warn_of_pictures_out_of_reach(done.out_of_reach, done.with_items, done.first_out_of_reach or "")
    result = {
        "gallery": place.gallery,
        "shards": done.shards,
        "pictures": done.pictures,
        "with_items": done.with_items,
        "empty": done.empty,
        "skipped": [
            {"shard": shard, "path": path, "reason": reason} for shard, path, reason in done.skipped
        ],
        "items": done.items.count,
        "keys": done.items.total,
        "rows": done.rows.total,
        "out_of_reach": done.out_of_reach,
        "first_out_of_reach": done.first_out_of_reach,
    }
    print_result(result, output.as_json, _print_merged)


def _print_merged(result: dict[str, Any]) -> None:
    rows = count_of(result["items"], "row")
    print_line(
        f"merged {count_of(result['shards'], 'shard')} of "
        f"{count_of(result['pictures'], 'picture')} into gallery '{result['gallery']}': "
        f"{result['with_items']} gave {rows}, {result['empty']} showed no person, "
        f"{len(result['skipped'])} could not be used",
        f"proof: read back, it has each of the {rows} of the shards once, and no other",
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

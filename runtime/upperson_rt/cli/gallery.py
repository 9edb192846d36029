"""`upperson-rt gallery ...`."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upperson_rt.cli.app import Command, new_app
from upperson_rt.cli.gallery_delete import delete, prune
from upperson_rt.cli.opening import read_filter
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
)
from upperson_rt.cli.output import (
    new_progress,
    new_table,
    print_json,
    print_line,
    print_note,
    print_notices,
    print_table,
    print_warning,
    warn_of_pictures_out_of_reach,
)
from upperson_rt.errors import IntegrityError, UsageError
from upperson_rt.printable import count_of, local_time
from upperson_rt.search.notices import unknown_cameras

if TYPE_CHECKING:
    from upperson_rt.gallery import IndexInfo

__all__ = [
    "app",
    "merge",
]

# --- `upperson-rt gallery merge`


def merge(
    shards: Annotated[
        list[str],
        typer.Argument(metavar="SHARD...", help="Galleries that `index --shard` has made."),
    ],
    gallery: GalleryOption = default_gallery,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Join all shards of a set of pictures into a new gallery, and prove that it is whole.

    The shards must be all parts of one list, each once and finished. Every row is checked when it
    is read, and the new gallery is read back and compared before it gets its name: it has each row
    of the shards once, or there is none. The shards stay as they are.

    Example: `upperson-rt gallery merge shards/* -g gallery`
    """
    from upperson_rt.gallery.sqlite.merge import merge_shards

    for place in (gallery, *shards):
        if "://" in place:
            raise UsageError(
                f"merge joins galleries in folders into one in a folder, not {place}: shards can "
                "be indexed into a collection of Milvus directly"
            )
    with new_progress(time_left=True) as bar:
        task = bar.add_task("merging", total=None)
        done = merge_shards(
            shards,
            Path(gallery),
            progress=lambda rows, total: bar.update(task, completed=rows, total=total),
        )
    for shard, _, reason in done.skipped:
        print_warning(f"shard {shard} skipped: {reason}")
    warn_of_pictures_out_of_reach(done.out_of_reach, done.with_items, done.first_out_of_reach or "")
    if as_json:
        print_json(
            {
                "gallery": gallery,
                "shards": done.shards,
                "pictures": done.pictures,
                "with_items": done.with_items,
                "empty": done.empty,
                "skipped": [
                    {"shard": shard, "path": path, "reason": reason}
                    for shard, path, reason in done.skipped
                ],
                "items": done.items.count,
                "keys": done.items.total,
                "rows": done.rows.total,
                "out_of_reach": done.out_of_reach,
                "first_out_of_reach": done.first_out_of_reach,
            }
        )
        return
    rows = count_of(done.items.count, "row")
    print_line(
        f"merged {count_of(done.shards, 'shard')} of {count_of(done.pictures, 'picture')} into "
        f"gallery '{gallery}': {done.with_items} gave {rows}, {done.empty} showed nobody, "
        f"{len(done.skipped)} could not be used"
    )
    print_line(f"proof: read back, it has each of the {rows} of the shards once, and no other")


# --- `upperson-rt gallery ...`


app = new_app("Look into a gallery, and look after it.")


@app.command(cls=Command)
def info(
    gallery: GalleryOption = default_gallery, as_json: Json = False, debug: Debug = False
) -> None:
    """Show what a gallery holds; needs no bundle.

    Example: `upperson-rt gallery info -g gallery`
    """
    from upperson_rt.gallery import Gallery

    with Gallery.open(gallery) as store:
        found = store.info()
    if as_json:
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
        table.add_row(name, value)
    print_table(table)


app.command(cls=Command)(delete)
app.command(cls=Command)(prune)
app.command(cls=Command)(merge)


@app.command(cls=Command)
def verify(
    gallery: GalleryOption = default_gallery, as_json: Json = False, debug: Debug = False
) -> None:
    """Read a whole gallery and check it, crops included; exit code 6 if anything is wrong.

    Example: `upperson-rt gallery verify -g gallery`
    """
    from upperson_rt.gallery import Gallery
    from upperson_rt.gallery.crops import has_hash

    unchecked = None  # A damaged gallery may not give its items.
    with Gallery.open(gallery) as store:
        problems = store.verify()
        items = store.count()
        if not problems:
            crops = (item.crop for item in store.items())
            unchecked = sum(crop is not None and not has_hash(crop) for crop in crops)
    if as_json:
        print_json(
            {
                "gallery": str(gallery),
                "items": items,
                "ok": not problems,
                "problems": problems,
                "crops_without_hash": unchecked,
            }
        )
    elif not problems:
        print_line(f"gallery '{gallery}' is sound: {count_of(items, 'picture')}")
        if unchecked:
            print_note(
                f"the content of {count_of(unchecked, 'crop')} cannot be checked: an older release "
                "or another program saved it, without a hash in its name"
            )
    if problems:
        for problem in problems:
            print_note(problem)
        raise IntegrityError(
            f"gallery '{gallery}' has {count_of(len(problems), 'problem')} (listed above). Where a "
            "line names no command: restore the gallery from a copy, or index those pictures again"
        )


@app.command(cls=Command)
def rebuild(
    gallery: GalleryOption = default_gallery, as_json: Json = False, debug: Debug = False
) -> None:
    """Make the search index anew from the stored vectors, and measure it if it is approximate.

    Worth it after a gallery has grown a lot; `gallery info` shows what is searched beside the
    index. Also after a deletion that must leave nothing behind: until then the file of the index
    keeps the vectors of what was deleted.

    Example: `upperson-rt gallery rebuild -g gallery`
    """
    from upperson_rt.gallery import Gallery

    with Gallery.open(gallery) as store:
        began = time.perf_counter()
        store.rebuild()
        seconds = time.perf_counter() - began
        found = store.info()
    if as_json:
        index = None if found.index is None else asdict(found.index)
        print_json({"gallery": gallery, "items": found.items, "seconds": seconds, "index": index})
    else:
        print_line(f"rebuilt in {seconds:.1f} s: {_index_line(found.index)}")


@app.command(cls=Command)
def export(
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the files go.")],
    gallery: GalleryOption = default_gallery,
    camera: Cameras = None,
    since: Since = None,
    until: Until = None,
    track: Track = None,
    where: Attributes = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write vectors.npy and items.csv; with pyarrow installed also items.parquet.

    Example: `upperson-rt gallery export exported/ --camera gate`
    """
    from upperson_rt.gallery import Gallery
    from upperson_rt.gallery.export import export_gallery

    passing = read_filter(camera, since, until, track, where)
    with Gallery.open(gallery) as store:
        print_notices(unknown_cameras(store, passing))
        done = export_gallery(store, output, passing)
    names = [path.name for path in done.files]
    if as_json:
        print_json({"gallery": gallery, "items": done.items, "folder": str(output), "files": names})
    else:
        print_line(f"exported {count_of(done.items, 'picture')} to {output}: {', '.join(names)}")


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

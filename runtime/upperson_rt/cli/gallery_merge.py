"""`upperson-rt gallery merge`."""

from pathlib import Path
from typing import Annotated

import typer

from upperson_rt.cli.options import Debug, GalleryOption, Json, default_gallery
from upperson_rt.cli.output import (
    new_progress,
    print_json,
    print_line,
    print_warning,
    warn_of_pictures_out_of_reach,
)
from upperson_rt.errors import UsageError
from upperson_rt.printable import count_of

__all__ = ["merge"]


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

"""`upperson-rt gallery merge`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from upperson_rt.cli.groups import grouped
from upperson_rt.cli.options import Output, Place
from upperson_rt.cli.output import (
    new_progress,
    print_line,
    print_result,
    print_warning,
    warn_of_pictures_out_of_reach,
)
from upperson_rt.errors import UsageError
from upperson_rt.printable import count_of


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
    from upperson_shards.merge import merge_shards

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
        "alerts": done.alerts,
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
    if alerts := result["alerts"]:
        print_line(f"{count_of(alerts, 'alert')} copied: the promised rates count from now")

"""`upperson-rt gallery delete` and `upperson-rt gallery prune`."""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upperson_rt.cli.groups import grouped
from upperson_rt.cli.opening import open_retriever
from upperson_rt.cli.options import (
    Debug,
    GalleryOption,
    Json,
    Model,
    Output,
    Searched,
    Where,
    age_seconds,
    default_gallery,
)
from upperson_rt.cli.output import (
    json_from_hit,
    print_hits,
    print_json,
    print_line,
    print_note,
    print_notices,
    print_prompt,
)
from upperson_rt.errors import UsageError
from upperson_rt.printable import count_of
from upperson_rt.search.notices import unknown_cameras

if TYPE_CHECKING:
    from upperson_rt.gallery import Filter
    from upperson_rt.retriever import Retriever

__all__ = ["delete", "prune"]

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")]


@grouped
def delete(
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY...", help="Keys of pictures; for files their paths."),
    ] = None,
    *,
    where: Where,
    model: Model,
    searched: Searched,
    output: Output,
    like: Annotated[
        Path | None,
        typer.Option(
            "--like", metavar="FILE", help="Delete what looks like this picture; needs the bundle."
        ),
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option(
            "--min-score",
            min=-1.0,
            max=1.0,
            metavar="S",
            help="With --like: the cosine from which a picture goes; a dry run shows the scores.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Delete pictures by key, by a filter, or by their looks, and their saved crops.

    With --like every picture that passes the filter is compared exactly. Looks are no identity:
    another person in the same coat scores high, and the same person in another coat does not. Look
    at a dry run first.

    Example: `upperson-rt gallery delete --camera gate --until 2026-11-01 --dry-run`

    Example: `upperson-rt gallery delete --like person.jpg --min-score 0.9 --dry-run`
    """
    from upperson_rt.gallery import Gallery

    passing, gallery = where.as_filter(), searched.gallery
    if (like is None) != (min_score is None):
        raise UsageError("--like and --min-score belong together: --like FILE --min-score 0.9")
    if keys and (like is not None or not passing.is_empty):
        raise UsageError("keys go alone: leave out --like and the filter, or the keys")
    if not keys and like is None and passing.is_empty:
        raise UsageError(
            "name keys, a filter such as --camera gate, or a picture with --like, to say what goes"
        )
    if like is not None and min_score is not None:
        with open_retriever(model, searched, "image") as (_, _, retriever):
            _delete_like(retriever, like, min_score, passing, yes, dry_run, output.as_json)
        return
    with Gallery.open(gallery) as store:
        print_notices(unknown_cameras(store, passing))
        wanted = {str(Path(key).absolute()) if os.path.exists(key) else key for key in keys or ()}
        count = len(store.ids(sorted(wanted))) if keys else store.count(passing)
        deleted = 0
        question = f"delete {count_of(count, 'picture')} from gallery '{gallery}'?"
        if count and not dry_run and _confirmed(question, yes):
            deleted = store.delete(sorted(wanted)) if keys else store.delete_where(passing)
            count = deleted
        left = store.count()
    _report_deleted(gallery, count, deleted, left, dry_run, output.as_json)


def prune(
    gallery: GalleryOption = default_gallery,
    older_than: Annotated[
        float | None,
        typer.Option(
            "--older-than",
            parser=age_seconds,
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
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Delete old pictures by age, by number or both, and their saved crops; asks nothing.

    Pictures without a time are never too old, but the first to go where there are too many. By age,
    and of all cameras, saved crops that belong to no picture go as well.

    Example: `upperson-rt gallery prune --older-than 30d --keep 1000000`
    """
    from upperson_rt.gallery import Filter, Gallery
    from upperson_rt.gallery.protocol import check_prune

    before = None if older_than is None else time.time() - older_than
    check_prune(before, keep)
    with Gallery.open(gallery) as store:
        print_notices(unknown_cameras(store, Filter(camera=camera)))
        count = store.count_prunable(before, keep, camera)
        deleted = 0 if dry_run else store.prune(before, keep, camera)
        left = store.count()
    _report_deleted(gallery, count, deleted, left, dry_run, as_json)


def _delete_like(
    retriever: "Retriever",
    like: Path,
    min_score: float,
    passing: "Filter",
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    store = retriever.gallery
    print_notices(unknown_cameras(store, passing))
    hits = retriever.delete_like(like, min_score, passing, dry_run=dry_run or not yes)
    if hits and not as_json:
        print_hits(hits, store.crops_dir)
    deleted = len(hits) if yes and not dry_run else 0
    question = f"delete {count_of(len(hits), 'picture')} from gallery '{store.location}'?"
    if hits and not dry_run and not yes and _confirmed(question, yes):
        hits = retriever.delete_like(like, min_score, passing)
        deleted = len(hits)
    shown = [json_from_hit(rank, hit, store.crops_dir) for rank, hit in enumerate(hits, start=1)]
    _report_deleted(store.location, len(hits), deleted, store.count(), dry_run, as_json, hits=shown)


def _confirmed(question: str, yes: bool) -> bool:
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UsageError(f"{question} Add --yes to do it without being asked")
    print_prompt(f"{question} [y/N]:")  # typer.confirm would use stdout, too.
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _report_deleted(
    gallery: str,
    count: int,
    deleted: int,
    left: int,
    dry_run: bool,
    as_json: bool,
    **more: Any,
) -> None:
    if as_json:
        print_json(
            {
                "gallery": gallery,
                "dry_run": dry_run,
                "matching": count,
                "deleted": deleted,
                "items": left,
                **more,
            }
        )
    elif dry_run:
        print_line(f"would delete {count} of {count_of(left, 'picture')} of gallery '{gallery}'")
    elif count and not deleted:
        print_line("nothing deleted")
    else:
        print_line(f"deleted {count_of(deleted, 'picture')}; gallery '{gallery}' now holds {left}")
    if not as_json and not count:
        print_note("no picture matches")

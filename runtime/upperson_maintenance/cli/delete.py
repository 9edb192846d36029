"""`upperson-rt gallery delete`."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upperson_rt.cli.groups import OptionGroup, grouped, option
from upperson_rt.cli.opening import open_retriever
from upperson_rt.cli.options import Model, Output, Searched, Where
from upperson_rt.cli.output import (
    json_from_hit,
    print_hits,
    print_line,
    print_note,
    print_notices,
    print_prompt,
    print_result,
)
from upperson_rt.errors import UsageError
from upperson_rt.printable import count_of, safe_repr
from upperson_rt.search.notices import unknown_cameras

if TYPE_CHECKING:
    from upperson_rt.gallery import Filter, Gallery
    from upperson_rt.retriever import Retriever


DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")]


@dataclass(frozen=True)
class Deletion(OptionGroup, panel="Deletion"):
    """What is deleted besides keys and filters, and whether at all."""

    like: Path | None = option(
        None, "Delete what looks like this picture; needs the bundle.", metavar="FILE"
    )
    min_score: float | None = option(
        None,
        "With --like: the lowest cosine that is deleted; a dry run shows the scores.",
        min=-1.0,
        max=1.0,
        metavar="S",
    )
    yes: bool = option(False, "Delete without a confirmation.", "--yes", "-y")
    dry_run: DryRun = False

    def require_selection(self, keys: list[str] | None, passing: "Filter") -> None:
        """Refuse selections that contradict each other, and none."""
        if (self.like is None) != (self.min_score is None):
            raise UsageError(
                "--like and --min-score belong together: --like FILE --min-score 0.9",
                code="min_score_missing",
            )
        if keys and (self.like is not None or not passing.is_empty):
            raise UsageError(
                "keys go alone: leave out --like and the filter, or the keys",
                code="selections_conflict",
            )
        if not keys and self.like is None and passing.is_empty:
            raise UsageError(
                "name keys, a filter such as --camera gate, or a picture with --like, to say what "
                "is deleted",
                code="selection_missing",
            )

    def confirmed(self, question: str) -> bool:
        """Return whether to delete, after asking on a terminal."""
        if self.yes or self.dry_run:
            return self.yes and not self.dry_run
        if not sys.stdin.isatty():
            raise UsageError(
                f"{question} Add --yes to delete without a confirmation",
                code="confirmation_missing",
            )
        print_prompt(f"{question} [y/N]:")  # typer.confirm would use stdout, too.
        return sys.stdin.readline().strip().lower() in ("y", "yes")


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
    deletion: Deletion,
    output: Output,
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
    deletion.require_selection(keys, passing)
    if deletion.like is not None and deletion.min_score is not None:
        with open_retriever(model, searched, "image") as (_, _, retriever):
            _delete_like(
                retriever, deletion.like, deletion.min_score, passing, deletion, output.as_json
            )
        return
    with Gallery.open(gallery) as store:
        print_notices(unknown_cameras(store, passing))
        wanted = {str(Path(key).absolute()) if os.path.exists(key) else key for key in keys or ()}
        known = store.ids(sorted(wanted)) if keys else {}
        count = len(known) if keys else store.count(passing)
        if known and (unknown := sorted(wanted - known.keys())):
            keys_of_none = f"{count_of(len(unknown), 'key')} of no picture"
            print_note(f"{keys_of_none}, such as {safe_repr(unknown[0])}")
        deleted = 0
        what, frames = count_of(count, "picture"), _frames_passing(store, passing)
        frame = f"the newest frame of {count_of(frames, 'camera')}"
        if frames:
            what += f" and {frame}"
        if frames and deletion.dry_run:
            print_note(f"would also delete {frame}")
        in_bin_alone = deletion.yes and store.bin is not None  # Counted when it is deleted.
        if (count or frames or in_bin_alone) and deletion.confirmed(
            f"delete {what} from gallery '{gallery}'?"
        ):
            if frames:
                print_note(f"deleting {frame} as well")
            deleted = store.delete(sorted(wanted)) if keys else store.delete_where(passing)
            count = deleted
        left = store.count()
    report_deleted(gallery, count, deleted, left, deletion.dry_run, output.as_json)


def _frames_passing(store: "Gallery", passing: "Filter") -> int:
    """Count the newest frames of cameras that `Gallery.delete_where` deletes."""
    from upperson_rt.gallery.snapshots import snapshot_folder, snapshots_passing

    folder = snapshot_folder(store)
    return 0 if folder is None or passing.is_empty else len(snapshots_passing(folder, passing))


def _delete_like(
    retriever: "Retriever",
    like: Path,
    min_score: float,
    passing: "Filter",
    deletion: Deletion,
    as_json: bool,
) -> None:
    store = retriever.gallery
    print_notices(unknown_cameras(store, passing))
    at_once = deletion.yes and not deletion.dry_run
    hits = retriever.delete_like(like, min_score, passing, dry_run=not at_once)
    if hits and not as_json:
        print_hits(hits, store.crops_dir)
    deleted = len(hits) if at_once else 0
    question = f"delete {count_of(len(hits), 'picture')} from gallery '{store.location}'?"
    if hits and not at_once and deletion.confirmed(question):
        hits = retriever.delete_like(like, min_score, passing)
        deleted = len(hits)
    shown = [json_from_hit(rank, hit, store.crops_dir) for rank, hit in enumerate(hits, start=1)]
    report_deleted(
        store.location, len(hits), deleted, store.count(), deletion.dry_run, as_json, hits=shown
    )


def report_deleted(
    gallery: str,
    count: int,
    deleted: int,
    left: int,
    dry_run: bool,
    as_json: bool,
    **more: Any,
) -> None:
    """Print what a deletion did; ``count`` pictures matched."""
    result = {
        "gallery": gallery,
        "dry_run": dry_run,
        "matching": count,
        "deleted": deleted,
        "items": left,
        **more,
    }
    print_result(result, as_json, _print_deleted)


def _print_deleted(result: dict[str, Any]) -> None:
    gallery, count, left = (result[name] for name in ("gallery", "matching", "items"))
    if result["dry_run"]:
        print_line(f"would delete {count} of {count_of(left, 'picture')} of gallery '{gallery}'")
    elif count and not result["deleted"]:
        print_line("nothing deleted")
    else:
        deleted = count_of(result["deleted"], "picture")
        print_line(f"deleted {deleted}; gallery '{gallery}' now holds {left}")
    if not count:
        print_note("no picture matches")

"""`upperson-rt gallery prune`."""

import time
from dataclasses import dataclass

from upperson_maintenance.cli.delete import DryRun, report_deleted
from upperson_maintenance.cli.retention import byte_size, read_retention
from upperson_rt.cli.groups import OptionGroup, grouped, option
from upperson_rt.cli.options import Output, Place
from upperson_rt.cli.output import print_notices
from upperson_rt.errors import UsageError
from upperson_rt.search.notices import unknown_cameras


@dataclass(frozen=True)
class Pruning(OptionGroup, panel="Deletion"):
    """Which pictures are old."""

    older_than: list[str] | None = option(
        None,
        "Delete pictures taken longer ago than this, such as 30d, 12h or 90m; with CAMERA= in "
        "front those of one camera. Repeatable.",
        metavar="[CAMERA=]AGE",
        show_default="any age",
    )
    keep_bytes: int | None = option(
        None,
        "Delete what is in the bin, then the oldest, while all files take more, such as 200G.",
        parser=byte_size,
        metavar="SIZE",
    )
    keep: int | None = option(None, "Keep only the newest N pictures.", min=0, metavar="N")
    camera: str | None = option(None, "Of this camera only.", show_default="all together")
    dry_run: DryRun = False


@grouped
def prune(*, place: Place, pruning: Pruning, output: Output) -> None:
    """Delete old pictures by age, by number or both, with their crops, without a confirmation.

    Pictures without a time are never too old, but the first to go where there are too many. By age,
    and of all cameras, saved crops that belong to no picture go as well. With --keep and
    --keep-bytes `watch` and `serve` do this by themselves.

    Example: `upperson-rt gallery prune --older-than 30d --keep 1000000`
    """
    from upperson_maintenance.retention import Retention
    from upperson_rt.gallery import Filter, Gallery
    from upperson_rt.gallery.protocol import check_prune

    retention = read_retention(pruning.older_than or (), pruning.keep_bytes)
    age = None if retention is None else retention.keep_s
    limits = None if age is None else time.time() - age, pruning.keep
    is_plain = retention is None or retention == Retention(keep_s=age)
    if is_plain:
        check_prune(*limits)
    elif pruning.keep is not None or pruning.camera is not None:
        raise UsageError(
            "--keep-bytes and ages of cameras go without --keep and --camera: leave those out",
            code="limits_conflict",
        )
    with Gallery.open(place.gallery) as store:
        named = [pruning.camera] if retention is None else [pruning.camera, *retention.by_camera]
        cameras = [name for name in named if name is not None]
        print_notices(unknown_cameras(store, Filter(camera=cameras or None)))
        if retention is None or is_plain:
            count = store.count_prunable(*limits, pruning.camera)
            deleted = 0 if pruning.dry_run else store.prune(*limits, pruning.camera)
        else:
            count = retention.enforce(store, dry_run=pruning.dry_run)
            deleted = 0 if pruning.dry_run else count
        left = store.count()
    report_deleted(place.gallery, count, deleted, left, pruning.dry_run, output.as_json)
